"""Keys: equal numbers are equal, everything else differs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from kvjax.ops import hashing

RNG = np.random.default_rng(0)


def latent_key(latent, env=0, epoch=0, **options):
    return hashing.latent_key(
        jnp.asarray(latent, jnp.float32), jnp.int32(env), jnp.uint32(epoch), **options
    )


class HashingTest(chex.TestCase, parameterized.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_one_zero_and_one_nan(self):
        bits = self.variant(hashing.canonical_bits)
        quiet = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
        np.testing.assert_array_equal(
            bits(quiet.view(np.float32)), np.full(4, 0x7FC00000, np.uint32)
        )
        np.testing.assert_array_equal(bits(np.array([0.0, -0.0], np.float32)), [0, 0])
        others = np.array([1.0, -1.0, np.inf, -np.inf, 1e-45, -1e-45, 1e-39], np.float32)
        np.testing.assert_array_equal(bits(others), others.view(np.uint32))

    @chex.all_variants(with_pmap=False)
    @parameterized.parameters(1, 7, 64, 768)
    def test_any_changed_bit_changes_every_lane(self, size):
        latent = RNG.normal(size=size).astype(np.float32)
        digest = self.variant(lambda x: hashing.digest(hashing.canonical_bits(x)))
        before = np.asarray(digest(latent))
        for index in {0, size // 2, size - 1}:
            changed = latent.copy()
            changed[index] = np.nextafter(changed[index], np.inf)
            assert (np.asarray(digest(changed)) != before).all()

    def test_order_matters(self):
        assert (latent_key([1.0, 2.0])[:4] != latent_key([2.0, 1.0])[:4]).all()
        assert (latent_key([0.0, 1.0])[:4] != latent_key([1.0, 0.0])[:4]).all()
        assert (latent_key([0.0])[:4] != latent_key([0.0, 0.0])[:4]).any()

    def test_environment_and_epoch_are_part_of_the_key(self):
        keys = [latent_key([1.0], env, epoch) for env in (0, 1) for epoch in (0, 1)]
        assert len({tuple(np.asarray(key)) for key in keys}) == 4
        assert len({tuple(np.asarray(key)[:4]) for key in keys}) == 1
        assert len({int(hashing.bucket(key)) for key in keys}) == 4

    def test_verified_keys_hold_the_latent(self):
        key = latent_key([1.5, -0.0], verify=True)
        np.testing.assert_array_equal(key[hashing.KEY_LANES :], [0x3FC00000, 0])
        np.testing.assert_array_equal(key[: hashing.KEY_LANES], latent_key([1.5, 0.0]))

    @chex.variants(with_jit=True, without_jit=True)
    def test_row_equals_row_alone(self):
        latents = RNG.normal(size=(5, 64)).astype(np.float32)
        together = self.variant(jax.vmap(latent_key))(latents)
        for latent, row in zip(latents, together, strict=True):
            np.testing.assert_array_equal(row, latent_key(latent))

    def test_a_hundred_thousand_random_latents_collide_in_no_lane_pair(self):
        """Two lanes are 64 bits: expected collisions 3e-10; each lane alone about 1.2."""
        latents = jnp.asarray(RNG.normal(size=(100_000, 4)), jnp.float32)
        digests = np.asarray(
            jax.jit(jax.vmap(hashing.digest))(jax.vmap(hashing.canonical_bits)(latents))
        )
        for lanes in ((0, 1), (2, 3), (1, 2), (0, 3)):
            assert len(np.unique(digests[:, lanes], axis=0)) == len(latents)
        for lane in range(4):
            assert len(latents) - len(np.unique(digests[:, lane])) < 12
        assert abs(np.unpackbits(digests.view(np.uint8)).mean() - 0.5) < 1e-3

    def test_paths_tell_equal_latents_apart(self):
        parent = latent_key([1.0], 3, 7)
        children = [np.asarray(hashing.path_key(parent, jnp.int32(a))) for a in range(3)]
        grandchildren = [np.asarray(hashing.path_key(c, jnp.int32(0))) for c in children]
        assert len({tuple(k) for k in [np.asarray(parent), *children, *grandchildren]}) == 7
        np.testing.assert_array_equal(children[0][4:], [3, 7])


def test_integer_keys():
    keys = [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF, 2**127]
    lanes = hashing.integer_digests(keys)
    assert lanes.dtype == np.uint32
    back = [sum(int(lane) << 32 * i for i, lane in enumerate(row)) for row in lanes]
    assert back == keys
    assert hashing.integer_digests([]).shape == (0, 4)


@pytest.mark.parametrize("key", [-1, 2**128])
def test_bad_integer_keys(key):
    with pytest.raises(ValueError, match=r"must be in 0 .. 2\*\*128 - 1"):
        hashing.integer_digests([key])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 130, 768])
def test_a_digest_is_one_sum_over_all_entries(size):
    """However many entries are mixed at a time."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, size, dtype=np.uint32)
    mix = hashing._mix
    lanes = mix(bits[:, None] ^ hashing._salts(size)).sum(0, dtype=np.uint32)
    expected = mix(lanes ^ mix(np.roll(lanes, 1) + hashing._GOLDEN))
    np.testing.assert_array_equal(hashing.digest(jnp.asarray(bits)), expected)
