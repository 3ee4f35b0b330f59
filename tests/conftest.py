"""Shared models and files, and how programs are compiled where tests run.

Nearly all the time of a test run goes into compilation. XLA leaves most of its optimisations out,
and what was compiled is kept in `.cache`, for all workers, subprocesses and notebooks of this run
and the next. Tests marked `optimised` look at what XLA makes of a program and run by themselves
with KVJAX_OPTIMISED; with KVJAX_FULL everything is optimised and more examples are drawn.
"""

import ctypes
import dataclasses
import gc
import importlib.metadata
import math
import os
import resource
import signal
from pathlib import Path

HERE = Path(__file__).parent
FULL = bool(os.environ.get("KVJAX_FULL"))
OPTIMISED = FULL or bool(os.environ.get("KVJAX_OPTIMISED"))
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # others may not know it, and abort
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FLAGS = os.environ.get("XLA_FLAGS", "")
if not OPTIMISED and QUICK not in FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} {QUICK}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def in_full(*values):
    """Parameters that bring too little for their time, but where everything is run."""
    return values if FULL else ()


import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from kvjax.config import WorldModelConfig  # noqa: E402
from kvjax.model import checkpoint, world_model  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script
jax.devices()  # starts jax before any test can set how calls are dispatched

DATA = HERE / "data"
MOST_MEMORY, MOST_MAPPINGS = 1.9 * 2**30, 30_000
"""A process may have 65,530 mappings, and each compiled program takes some, and memory."""


def pytest_collection_finish():
    """What was imported stays: to look through it for garbage takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def let_programs_go():
    """Lets compiled programs go if a worker would soon run out of memory or of mappings."""
    status = Path("/proc/self")
    if not (status / "statm").exists():
        return
    memory = int((status / "statm").read_text().split()[1]) * resource.getpagesize()
    if memory > MOST_MEMORY or (status / "maps").read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    yield
    let_programs_go()


SMALL = WorldModelConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_actions=3,
    context_length=8,
    max_tokens=12,
    observation_size=5,
    support=(-3, 3),
)


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def masked_agent():
    return checkpoint.load(checkpoint.shipped()["cartpole_masked"])


def with_mode(config, mode):
    """A configuration in another window mode; rotary ones have no position table."""
    max_tokens = None if mode.startswith("rope") else 24
    return dataclasses.replace(config, window_mode=mode, max_tokens=max_tokens)


def random_params(config, seed=0):
    """Every weight random, norms and statistics too, so that none can be left out unnoticed."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = 0.2 * rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "embedding"):  # as wide as they are when training begins
            inputs = math.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else leaf.shape[-1]
            value += rng.normal(size=leaf.shape) / math.sqrt(inputs)
        if path[-1].key in ("scale", "var"):
            value = np.abs(1.0 + value)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, world_model.params_shapes(config))
