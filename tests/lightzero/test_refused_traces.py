"""Damaged traces, and those that hold nothing to compare, are refused before anything runs."""

import functools
import io
import json
import os
import re
import struct
import zipfile

import numpy as np
import pytest
from conftest import DATA

from kvjax.lightzero.traces import npz, recording, search_trace
from kvjax.lightzero.traces import trace as traces
from kvjax.tools.parity import verify, verify_episodes, verify_trees

FULL = bool(os.environ.get("KVJAX_FULL"))


@functools.cache
def good(kind):
    """A small trace of each kind, as arrays by name."""
    if kind == "world model":
        arrays = npz.read_arrays(DATA / "lightzero_020_abs.npz")
        arrays = {n: a for n, a in arrays.items() if not n.startswith("step") or n[4] == "1"}
        arrays = {n.replace("step1/", "step0/"): a for n, a in arrays.items()}
        return described(arrays, kind, steps=1)
    if kind == "episodes":
        arrays = npz.read_arrays(DATA / "cartpole_masked_episodes.npz")
        return {n: a if n == "config" else a[:3] for n, a in arrays.items()}
    arrays = npz.read_arrays(DATA / "lightzero_main_trees.npz")
    arrays = {n: a for n, a in arrays.items() if n.startswith(("0/", "1/", "meta"))}
    return arrays | {"meta": np.array(json.dumps(json.loads(str(arrays["meta"]))[:2]))}


READERS = {
    "world model": traces.read,
    "trees": search_trace.read_trees,
    "episodes": search_trace.read_episodes,
}
loaded = functools.cache(lambda: traces.load(weights(), num_heads=4, context_length=8))


def weights():
    arrays = good("world model")
    return {n.removeprefix("weights/"): a for n, a in arrays.items() if n.startswith("weights/")}


def described(arrays, kind, **changes):
    """The arrays with another description; a tree trace's second tree is changed."""
    name = "meta" if kind == "trees" else "config"
    content = json.loads(str(arrays[name]))
    (content[1] if kind == "trees" else content).update(changes)
    return arrays | {name: np.array(json.dumps(content))}


@pytest.fixture
def read(monkeypatch):
    """Reads arrays as if they came from a file called `trace`; weights are converted once."""

    def read(kind, arrays):
        monkeypatch.setattr(recording, "read_arrays", lambda path: arrays)
        return READERS[kind]("trace")

    model = loaded()
    monkeypatch.setattr(traces, "load", lambda *args, **options: model)
    return read


@pytest.mark.parametrize("kind", READERS)
def test_the_good_ones_are_read(read, kind):
    read(kind, good(kind))


def rotten(array):
    """What an array may be instead of itself, by a word of what is told."""
    yield "missing", None
    yield "expected numbers", array.astype(str)
    yield "expected numbers", array.astype(complex)
    yield "shape", array[None]
    if array.size and array.ndim:
        yield "shape", array[..., :0]
    if array.dtype.kind == "f":
        yield "NaN", np.full_like(array, np.nan)
        yield "infinity", np.full_like(array, -np.inf)
    elif array.dtype.kind == "i":
        yield "integers", array + 0.5
        yield "must be in", np.full_like(array, -2)
        yield "must be in", np.full_like(array, 2**40, dtype=np.int64)


@pytest.mark.parametrize("kind", READERS)
def test_every_array_must_be_there_real_finite_and_in_range(read, kind):
    arrays = good(kind)
    names = [n for n in arrays if n not in ("config", "meta") and not n.startswith("weights/")]
    assert len(names) >= 10
    for name in names:
        for told, value in rotten(arrays[name]):
            changed = {n: a for n, a in arrays.items() if n != name}
            if value is not None:
                changed[name] = value
            with pytest.raises(ValueError, match=told) as refused:
                read(kind, changed)
            assert name in str(refused.value), refused.value


def test_no_parent_comes_after_its_child(read):
    arrays = good("world model")
    for name, beyond in (("step0/parent", 1), ("step0/depth", 2)):
        changed = arrays[name].copy()
        changed[0, 1] = beyond  # later simulations may have that
        with pytest.raises(ValueError, match=f"{name} must be in .*, got {beyond}"):
            read("world model", arrays | {name: changed})


COUNTS = {
    "world model": (*traces.COUNTS, *traces.OTHER_COUNTS),
    "trees": ("actions", "simulations"),
    "episodes": ("num_heads", "context_length", "simulations"),
}
NO_COUNTS = (0, -3, True, 1.0, 2.5, "4", None, [4], {}, float("nan"), 2**40, 10**30)
NO_NUMBERS = ("x", None, [1.0], {}, True, float("nan"), float("inf"))
OTHERS = {
    "world model": {
        "source": (None, 3, []),
        "rope": ("no", 1, None),
        "rope_positions": (None, [], 3),
        "rope_theta": NO_NUMBERS,
        "policy_clip": (3, [], "hard", {}, {"method": "adaptive"}, {"method": "hard", "low": None}),
    },
    "trees": {"discount": NO_NUMBERS, "noise": ("no", 1, None)},
    "episodes": {
        "discount": NO_NUMBERS,
        "seeds": (None, 3, "10", [], ["a"], [1.5], [True], [-1], [1000, 1000], {}),
        "support": (3, None, "ab", [1], [1, 2, 3], ["a", "b"], [-50.0, 50.0], [3, 3], [3, -3]),
        "env": (None, 3, "", [], "module:CartPole-v0", ":"),
        "obs_scale": (3, "abcd", [], ["a"], [float("nan")], [None], {}),
        "rebuild": ("no", 1, None),
    },
}


@pytest.mark.parametrize("kind", READERS)
def test_every_count_is_one(read, kind):
    for name in COUNTS[kind]:
        for value in NO_COUNTS:
            with pytest.raises(ValueError, match=f"{name}.* (integer|at most)"):
                read(kind, described(good(kind), kind, **{name: value}))


@pytest.mark.parametrize("kind", READERS)
def test_every_other_field_is_looked_at(read, kind, monkeypatch):
    monkeypatch.undo()  # with the real weights: these fields go to the model's configuration
    monkeypatch.setattr(recording, "read_arrays", lambda path: changed)
    for name, values in OTHERS[kind].items():
        rope = {"rope": True} if name == "rope_positions" else {}
        for value in values:
            changed = described(good(kind), kind, **(rope | {name: value}))
            with pytest.raises(ValueError, match=name.removeprefix("obs_")):
                READERS[kind]("trace")


@pytest.mark.parametrize("name", traces.SIZES)
def test_a_size_that_the_weights_contradict(read, name):
    with pytest.raises(ValueError, match=f"config says {name} 7, the weights"):
        read("world model", described(good("world model"), "world model", **{name: 7}))


def test_weights_of_text(read):
    name = "weights/pos_emb.weight"
    changed = good("world model") | {name: good("world model")[name].astype(str)}
    with pytest.raises(ValueError, match=f"{name} holds <U32, expected numbers"):
        read("world model", changed)


def test_episodes_of_different_sizes(read):
    changed = dict(good("episodes"))
    changed["seed1001/obs"] = changed["seed1001/obs"][:, :2]
    with pytest.raises(ValueError, match="observations of seed 1000 are 4 wide, of seed 1001 2"):
        read("episodes", changed)


def test_a_large_replay_is_told_its_size(read, monkeypatch):
    """33 windows of 8 tokens with two layers of 64 numbers, keys and values, four bytes each."""
    trees, episodes = good("trees"), good("episodes")  # the data's files are larger
    monkeypatch.setattr(npz, "MOST_BYTES", 33 * 8 * 2 * 2 * 64 * 4 - 1)
    told = "33 windows of 8 tokens are too large: 270,336 bytes, .* at most 270,335"
    with pytest.raises(ValueError, match=told):
        read("world model", good("world model"))
    monkeypatch.setattr(npz, "MOST_BYTES", 4 * (9 * 3 + 9 * 2) * (3 + 2) - 1)
    with pytest.raises(ValueError, match="2 trees of up to 9 nodes are too large: 900 bytes"):
        verify_trees._check_size("trace", read("trees", trees))
    trace = read("episodes", episodes)
    monkeypatch.setattr(npz, "MOST_BYTES", 26 * 8 * 2 * 2 * 64 * 4 - 1)
    with pytest.raises(ValueError, match="26 nodes with 8 tokens are too large: 212,992 bytes"):
        verify_episodes._read_player("trace", trace, "cartpole_masked")


def test_keys_of_another_length_are_a_difference():
    """Not compared with one token for all, as broadcasting would."""
    recorded = {n.removeprefix("step0/"): a for n, a in good("world model").items()}
    window = verify.Window(np.zeros((3, 8, 2, 2, 4, 16)), recorded["length"])
    answers = np.zeros(3), np.zeros(3)

    def lengths(**changes):
        found = list(verify._compare_root(window, *answers, recorded | changes))
        names = [name for name, *_ in found]
        ours, theirs = next(pair for name, *pair in found if name == verify._LENGTH)
        return names.count("k"), int((ours != theirs).sum())

    assert lengths() == (3, 0)
    assert lengths(k1=recorded["k1"][:, :, :1], v1=recorded["v1"][:, :, :1]) == (2, 1)
    assert lengths(length=recorded["length"] + [0, 0, 1]) == (2, 1)


def header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def written(path, members, patch=None, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    if patch:
        content = bytearray(path.read_bytes())
        patch(content)
        path.write_bytes(content)
    return path


def patch_members(content, sign, offset, change):
    at = content.find(sign)
    while at >= 0:
        content[at + offset : at + offset + 2] = change(content[at + offset : at + offset + 2])
        at = content.find(sign, at + 4)


def unknown_compression(content):
    patch_members(content, b"PK\x01\x02", 10, lambda _: struct.pack("<H", 99))


def encrypted(content):
    patch_members(content, b"PK\x01\x02", 8, lambda flags: bytes([flags[0] | 1, flags[1]]))


def broken_stream(content):
    content[35:60] = bytes(25)


def huge_member(content):
    """The directory claims 4 GB."""
    patch_members(content, b"PK\x01\x02", 24, lambda _: b"\xff\xff")
    patch_members(content, b"PK\x01\x02", 26, lambda _: b"\xff\x7f")


NUMBERS = saved(np.arange(64.0))


@pytest.mark.parametrize(
    ("members", "patch", "message"),
    [
        ([("x.npy", header("(25000000000,)"))], None, "x claims 100,000,000,000 bytes"),
        ([("x.npy", header(f"({2**70},)"))], None, "x claims 4,722,366,482,869,645,213,696 bytes"),
        ([("x.npy", header("(-4,)"))], None, "x has an impossible shape"),
        ([("x.npy", header("(True,)") + b"1234")], None, "x has an impossible shape"),
        ([("x.npy", header("(1,)") + b"12345678")], None, "claims 4 bytes, shape .1,.; it holds 8"),
        ([("x.npy", header("(2,)") + b"1234")], None, "claims 8 bytes, shape .2,.; it holds 4"),
        ([("x.npy", b"hello")], None, "magic string"),
        ([("x.npy", b"")], None, "magic string"),
        ([("x.npy", b"\x93NUMPY\x09\x00" + NUMBERS[8:])], None, "unknown version"),
        ([("x.npy", b"\x93NUMPY\x01\x00\x04\x00((((")], None, "not a readable .npz trace"),
        ([("x.npy", saved(np.array([{}]), allow_pickle=True))], None, "holds object, expected num"),
        ([("x.npy", saved(np.zeros(2, "i4,f4")))], None, "expected numbers or text"),
        ([("x.npy", NUMBERS)], unknown_compression, "x.npy has an unknown compression 99"),
        ([("x.npy", NUMBERS)], encrypted, "x.npy is encrypted"),
        ([("x.npy", NUMBERS)], broken_stream, "not a readable .npz trace"),
        ([("x.npy", NUMBERS)], huge_member, "x.npy claims 2,147,483,647 bytes in"),
        ([("x.npy", NUMBERS), ("x", NUMBERS)], None, "two arrays are called x"),
    ],
)
def test_bad_archives(tmp_path, members, patch, message):
    path = written(tmp_path / "trace.npz", members, patch)
    with pytest.raises(ValueError, match=message):
        npz.read_arrays(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name(tmp_path):
    path = written(tmp_path / "trace.npz", [("x.npy", NUMBERS), ("x.npy", saved(np.ones(1)))])
    with pytest.raises(ValueError, match="two arrays are called x"):
        npz.read_arrays(path)


def test_other_members_are_nobodys_business(tmp_path):
    path = written(tmp_path / "trace.npz", [("x.npy", NUMBERS), ("notes.txt", b"hello")])
    assert npz.read_arrays(path).keys() == {"x"}


def test_a_stream_that_holds_more_than_its_directory_says(tmp_path):
    def smaller(content):
        patch_members(content, b"PK\x01\x02", 24, lambda _: struct.pack("<H", 128))

    path = written(tmp_path / "trace.npz", [("x.npy", saved(np.zeros(10**6)))], smaller)
    with pytest.raises(ValueError, match="not a readable .npz trace"):
        npz.read_arrays(path)


def test_a_large_archive_is_told_its_size(tmp_path, monkeypatch):
    path = written(tmp_path / "trace.npz", [("x.npy", NUMBERS), ("y.npy", NUMBERS)])
    monkeypatch.setattr(npz, "MOST_BYTES", 1279)
    with pytest.raises(ValueError, match="arrays are too large: 1,280 bytes, .* at most 1,279"):
        npz.read_arrays(path)
    monkeypatch.setattr(npz, "MOST_BYTES", 1280)
    assert npz.read_arrays(path).keys() == {"x", "y"}


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match=r"pipe.npz is no file, expected a trace"):
        npz.read_arrays(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="is a folder, expected a trace"):
        npz.read_arrays(tmp_path)
    with pytest.raises(ValueError, match="/dev/zero is no file"):
        npz.read_arrays("/dev/zero")


def test_arrays_come_as_numpy_reads_them(tmp_path):
    arrays = {"a": np.zeros((0, 3)), "b": np.array("é"), "c": np.ones((), bool)}
    arrays |= {"d": np.asfortranarray(np.arange(6).reshape(2, 3)), "e": np.arange(3, dtype=">f4")}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = npz.read_arrays(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype.newbyteorder("=")


def test_an_entry_of_the_directory_that_swallows_the_next_one(tmp_path):
    """By what it claims for its comment's length; zipfile does not count what it lists."""
    path = tmp_path / "t.npz"
    np.savez(path, a=np.zeros(2), b=np.ones(3), c=np.ones(1))
    content = bytearray(path.read_bytes())
    first, second, third = (m.start() for m in re.finditer(b"PK\x01\x02", content))
    content[first + 32 : first + 34] = (third - second).to_bytes(2, "little")
    path.write_bytes(content)
    assert set(np.load(path).files) == {"a", "c"}
    with pytest.raises(ValueError, match="its directory claims 3 members and lists 2"):
        npz.read_arrays(path)


@pytest.mark.parametrize("kind", READERS)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, kind):
    """Checksums cover the arrays; dates and the like are nobody's business."""
    path, rng, tries = tmp_path / "t.npz", np.random.default_rng(0), 1000 if FULL else 20
    np.savez_compressed(path, **good(kind))
    content = bytearray(path.read_bytes())
    right, refused = npz.read_arrays(path), 0
    for bit in rng.integers(8 * len(content), size=tries).tolist():
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            found = npz.read_arrays(path)
        except ValueError:
            refused += 1
            continue
        assert found.keys() == right.keys(), bit
        for name, array in found.items():
            assert array.dtype == right[name].dtype, (bit, name)
            assert array.tobytes() == right[name].tobytes(), (bit, name)
    print(f"{kind}: {refused} of {tries} refused, the others are read as they were")
    assert refused > tries / 3
