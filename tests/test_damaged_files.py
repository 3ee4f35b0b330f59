"""Checkpoints with one bit turned over: refused, or read as they were written.

With `KVJAX_FULL` 1,000 bits of each kind of file, anywhere and among what is no weight.
"""

import functools
import json
import os
import shutil
import struct
import zipfile

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from kvjax.model import checkpoint
from kvjax.tools.agent import find_agent

FLIPS = 1000 if os.environ.get("KVJAX_FULL") else 60
KINDS = ("0.2.0", "main", "kvjax", "earlier kvjax")
OPTIONS = {"num_heads": 2, "context_length": 8}


@pytest.fixture(scope="module")
def sources(data, tmp_path_factory):
    """A file of each kind, and where bytes lie in it that are no weights."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("whole")
    shipped, earlier = checkpoint.shipped()["cartpole_masked"], folder / "earlier.safetensors"
    without_digest(shipped, earlier)
    early = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    late = data / "cartpole_masked_rope_lightzero_main.pth.tar"
    return dict(zip(KINDS, (early, late, shipped, earlier), strict=True))


def without_digest(source, target):
    """What a kvjax without digests wrote."""
    with safetensors.safe_open(source, framework="numpy") as file:
        described = json.loads(file.metadata()["kvjax"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: described[name] for name in ("config", "environment")}
    safetensors.numpy.save_file(tensors, target, metadata={"kvjax": json.dumps(kept)})


def structure(path):
    """Positions of bytes that are no weights."""
    if path.suffix == checkpoint.SUFFIX:
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        return np.arange(8 + size)
    is_weight = np.zeros(path.stat().st_size, bool)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if "/data/" in member.filename:
                with archive.open(member) as file:
                    start = file._orig_compress_start
                is_weight[start : start + member.file_size] = True
    return np.flatnonzero(~is_weight)


@functools.cache
def content(path):
    found = find_agent(path, **OPTIONS)
    return found.agent.config, jax.tree.map(np.asarray, found.agent.params)


def is_as_written(path, original):
    """Whether a file is read as the original; None where it is refused in clear words."""
    try:
        found = find_agent(path, **OPTIONS)
    except (ValueError, OSError):
        return None
    config, params = content(original)
    equal = jax.tree.map(np.array_equal, found.agent.params, params)
    return found.agent.config == config and all(jax.tree.leaves(equal))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["anywhere", "structure"])
def test_no_damaged_weight_is_accepted_where_there_is_a_checksum(sources, tmp_path, kind, where):
    source = sources[kind]
    raw = bytearray(source.read_bytes())
    places = np.arange(len(raw)) if where == "anywhere" else structure(source)
    path = tmp_path / source.name
    rng = np.random.default_rng(KINDS.index(kind))
    told = {True: 0, None: 0, False: 0}
    flips = (
        max(6, FLIPS // 10) if kind == "earlier kvjax" else FLIPS
    )  # most of those are read whole
    for place, bit in zip(rng.choice(places, flips), rng.integers(8, size=flips), strict=True):
        raw[place] ^= 1 << bit
        path.write_bytes(raw)
        raw[place] ^= 1 << bit
        answer = is_as_written(path, source)
        told[answer] += 1
        assert answer is not False or kind == "earlier kvjax", (place, bit)
    print(f"{kind}, {where}: {told[None]} refused, {told[True]} as written, {told[False]} damaged")
    assert told[None] > flips // 10 or kind == "earlier kvjax"


def test_whole_files_are_accepted(sources, tmp_path):
    for source in sources.values():
        path = tmp_path / source.name
        shutil.copy(source, path)
        assert is_as_written(path, source)
