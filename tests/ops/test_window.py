"""Window ops against lists of tokens. The drawings of the docstrings are the expected arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl.testing import parameterized

from kvjax.config import WindowConfig
from kvjax.ops import window as windows
from kvjax.ops.window import AlignedWindow, Window

CONFIG = WindowConfig(context_length=8, num_layers=2, num_heads=3, head_dim=4)
SHAPE = CONFIG.token_shape
RNG = np.random.default_rng(0)


def tokens(count, seed=0):
    return list(np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32))


def window(held, capacity=CONFIG.context_length):
    kv = oracle.pad(held, capacity, SHAPE)
    return Window(jnp.asarray(kv, jnp.float32), jnp.asarray(len(held), jnp.int32))


def aligned(held, pad, capacity=CONFIG.context_length):
    kv = oracle.pad(held, capacity, SHAPE, left=pad)
    return AlignedWindow(jnp.asarray(kv, jnp.float32), jnp.int32(len(held)), jnp.int32(pad))


def stack(items):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)


def row(batch, index):
    return jax.tree.map(lambda leaf: leaf[index], batch)


def letters(kv):
    """Reads a drawing back: tokens filled with 1, 2, ... are a, b, ...; zero is a dot."""
    return "".join(".abcdefgh"[int(x)] for x in np.asarray(kv).reshape(len(kv), -1)[:, 0])


def drawn(text):
    """[a b . .] -> Window of tokens filled with 1, 2."""
    values = [".abcdefgh".index(c) for c in text if c not in " []"]
    kv = jnp.asarray(values, jnp.float32)[:, None, None, None, None] * jnp.ones((1, 1, 2, 1, 1))
    return Window(kv, jnp.asarray(sum(v > 0 for v in values), jnp.int32))


class DrawingsTest(parameterized.TestCase):
    def test_append(self):
        grown = windows.append(drawn("[a b . .]"), 3 * jnp.ones((1, 2, 1, 1)))
        assert letters(grown.kv) == "abc."

    def test_valid_mask(self):
        np.testing.assert_array_equal(windows.valid_mask(drawn("[a b . .]")), [1, 1, 0, 0])
        moved = windows.right_align(drawn("[a b . .]"), 3)
        np.testing.assert_array_equal(windows.valid_mask(moved), [0, 1, 1, 0])

    @parameterized.parameters(("a . . .", "..a."), ("a b . .", ".ab."))
    def test_right_align(self, before, after):
        assert letters(windows.right_align(drawn(before), 3).kv) == after

    def test_right_align_fills_the_window_by_default(self):
        assert letters(windows.right_align(drawn("a b . .")).kv) == "..ab"

    def test_trim_and_pad_and_back(self):
        batch = stack([drawn("a . . ."), drawn("b c . ."), drawn("d e f .")])
        out = windows.trim_and_pad(batch)
        assert [letters(kv) for kv in out.kv] == ["..a.", ".bc.", "def."]
        back = windows.undo_trim_and_pad(out)
        assert [letters(kv) for kv in back.kv] == ["a...", "bc..", "def."]
        chex.assert_trees_all_equal(back, batch)

    @parameterized.parameters(("abcdefg.", "cdefg..."), ("abcde...", "abcde..."))
    def test_slide(self, before, after):
        slid = windows.slide(drawn(before), jnp.zeros((5, 1, 2, 1, 1)))
        assert letters(slid.kv) == after


class WindowTest(chex.TestCase, parameterized.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_init_is_empty(self):
        empty = self.variant(lambda: windows.init(CONFIG))()
        chex.assert_trees_all_equal(empty, window([]))

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(range(CONFIG.context_length))
    def test_append(self, length):
        *held, last = tokens(length + 1)
        grown = self.variant(windows.append)(window(held), jnp.asarray(last))
        chex.assert_trees_all_equal(grown, window([*held, last]))

    @chex.all_variants(with_pmap=False)
    def test_append_to_a_full_window_changes_nothing_and_says_so(self):
        full = window(tokens(CONFIG.context_length))
        assert bool(self.variant(windows.is_full)(full))
        grown = self.variant(windows.append)(full, jnp.asarray(tokens(1, seed=9)[0]))
        chex.assert_trees_all_equal(grown, full)
        assert not bool(windows.is_full(window(tokens(CONFIG.context_length - 1))))

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(range(CONFIG.context_length + 1))
    def test_valid_mask(self, length):
        mask = self.variant(windows.valid_mask)(window(tokens(length)))
        np.testing.assert_array_equal(mask, [i < length for i in range(CONFIG.context_length)])

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters((0, 0), (0, 5), (1, 1), (3, 5), (5, 5), (5, 8), (8, 8))
    def test_right_align_and_left_align(self, length, size):
        held = tokens(length)
        moved = self.variant(windows.right_align)(window(held), jnp.int32(size))
        chex.assert_trees_all_equal(moved, aligned(held, size - length))
        np.testing.assert_array_equal(
            windows.valid_mask(moved), [size - length <= i < size for i in range(8)]
        )
        chex.assert_trees_all_equal(self.variant(windows.left_align)(moved), window(held))

    def test_right_align_below_the_length_counts_as_the_length(self):
        chex.assert_trees_all_equal(
            windows.right_align(window(tokens(3)), 1), aligned(tokens(3), 0)
        )

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(((1, 3, 5),), ((5, 5, 5),), ((0, 2, 8),), ((0, 0, 0),), ((4,),))
    def test_trim_and_pad_and_its_inverse(self, lengths):
        held = [tokens(n, seed=i) for i, n in enumerate(lengths)]
        batch = stack([window(h) for h in held])
        out = self.variant(windows.trim_and_pad)(batch)
        longest = max(lengths)
        expected = stack([aligned(h, longest - len(h)) for h in held])
        chex.assert_trees_all_equal(out, expected)
        chex.assert_trees_all_equal(self.variant(windows.undo_trim_and_pad)(out), batch)

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(range(CONFIG.context_length))
    def test_slide(self, length):
        held = tokens(length)
        correction = np.stack(tokens(CONFIG.kept_length, seed=1))
        slid = self.variant(windows.slide)(window(held), jnp.asarray(correction))
        expected = oracle.slide(held, CONFIG.context_length, correction)
        assert int(slid.length) == (5 if length == 7 else length)
        chex.assert_trees_all_equal(slid, window(expected))

    @parameterized.parameters(4, 6, 20)
    def test_slide_meets_its_threshold_at_every_context_length(self, context_length):
        held = tokens(context_length - 1)
        correction = np.stack(tokens(context_length - 3, seed=1))
        slid = windows.slide(window(held, context_length), jnp.asarray(correction))
        expected = oracle.slide(held, context_length, correction)
        self.assertLen(expected, context_length - 3)
        chex.assert_trees_all_equal(slid, window(expected, context_length))

    def test_bfloat16_windows_stay_bfloat16(self):
        config = WindowConfig(8, 2, 3, 4, dtype="bfloat16")
        grown = windows.append(windows.init(config), jnp.ones(SHAPE, jnp.float32))
        slid = windows.slide(grown, jnp.ones((5, *SHAPE), jnp.float32))
        chex.assert_type([grown.kv, slid.kv], jnp.bfloat16)


class WhereTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_where(self):
        one, other = window(tokens(2)), window(tokens(5, seed=1))
        chosen = self.variant(windows.where)(jnp.asarray(True), one, other)
        chex.assert_trees_all_equal(chosen, one)
        chosen = self.variant(windows.where)(jnp.asarray(False), one, other)
        chex.assert_trees_all_equal(chosen, other)


class BatchTest(chex.TestCase, parameterized.TestCase):
    """A row of a batch equals the same row alone, at unequal lengths."""

    LENGTHS = (0, 1, 4, 6, 7)

    def batch(self):
        return stack([window(tokens(n, seed=n)) for n in self.LENGTHS])

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("append", lambda w: windows.append(w, jnp.ones(SHAPE))),
        ("slide", lambda w: windows.slide(w, jnp.ones((5, *SHAPE)))),
        ("right_align", lambda w: windows.right_align(w, 7)),
        ("valid_mask", windows.valid_mask),
        ("is_full", windows.is_full),
    )
    def test_row_equals_row_alone(self, op):
        together = self.variant(jax.vmap(op))(self.batch())
        for index in range(len(self.LENGTHS)):
            alone = self.variant(op)(row(self.batch(), index))
            chex.assert_trees_all_equal(row(together, index), alone)


class BadInputTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"context_length": 7}, "must be even"),
        ({"context_length": 2}, "at least 4"),
        ({"context_length": 8.0}, "positive integer"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_heads": -1}, "num_heads must be a positive integer, got -1"),
        ({"head_dim": True}, "head_dim must be a positive integer, got True"),
        ({"dtype": "float16"}, "float32, bfloat16, float64, got 'float16'"),
    )
    def test_configuration(self, change, message):
        fields = {"context_length": 8, "num_layers": 2, "num_heads": 3, "head_dim": 4}
        with pytest.raises(ValueError, match=message):
            WindowConfig(**(fields | change))

    def test_append_of_a_token_of_another_shape(self):
        told = r"kv_token must have shape \[2, 2, 3, 4\], got \[2, 2, 3, 5\]"
        with pytest.raises(ValueError, match=told):
            windows.append(window([]), jnp.zeros((2, 2, 3, 5)))

    def test_slide_with_a_correction_of_another_length(self):
        told = r"correction must have shape \[5, 2, 2, 3, 4\], got \[4, 2, 2, 3, 4\]"
        with pytest.raises(ValueError, match=told):
            windows.slide(window([]), jnp.zeros((4, *SHAPE)))
