"""Imports point downward only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import kvjax

LAYERS = (
    ("values",),
    (
        *("config", "display", "display_tree", "statistics", "compilation", "interrupts", "files"),
        *("loops", "meshes"),
    ),
    ("types", "dlpack"),
    ("ops.window", "ops.position", "ops.attention", "ops.support", "ops.hashing"),
    ("ops", "reference_tree"),
    ("pool",),  # storage stands below the model
    ("store",),
    ("checks",),
    ("encoders",),
    ("world_model",),
    ("step",),
    ("fused", "tree", "mctx_search", "contexts", "rollout"),
    ("fused_step",),
    ("own_token_search", "params_update"),
    ("subtree",),
    ("search", "inference", "serialization"),
    ("host_search",),
    ("planner", "checkpoint", "lightzero.encoder_tensors", "lightzero.npz", "gif"),
    ("lightzero.module", "lightzero.experiment", "lightzero.torch_file", "lightzero.tensors"),
    ("lightzero.described", "lightzero.shapes"),
    ("lightzero.configuration",),
    ("lightzero.checkpoint", "lightzero.keys_values", "lightzero.archive", "near_ties"),
    ("lightzero.kv_cache_pool",),
    ("lightzero.kv_cache_manager", "lightzero.trace", "lightzero.search_trace"),
    ("lightzero.record", "lightzero.layout", "lightzero.routes"),
    ("lightzero.padding",),
    ("lightzero.caches",),
    ("lightzero.exchange",),
    ("lightzero.bridge", "lightzero.shadow"),
    ("lightzero.exact",),
    ("lightzero.root_step",),
    ("lightzero.attached",),
    ("lightzero.attach",),
    ("lightzero",),
    ("",),
    ("agent",),
    ("verify_trees",),
    ("verify_episodes",),
    ("play", "verify", "bench.timing", "bench.lightzero_020"),
    ("bench",),
    ("bench.floor", "bench.case"),
    ("bench.search", "bench.ops", "bench.bridge", "bench.exactness"),
    ("cli",),
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
ROOT = Path(kvjax.__file__).parent


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path):
    """kvjax modules that a file imports, a name of a package counting as its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvjax":
            base = node.module.removeprefix("kvjax").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                yield name if name in LEVEL else base
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("kvjax") for alias in node.names), path


def test_every_module_has_its_layer():
    assert {module_name(path) for path in ROOT.rglob("*.py")} == LEVEL.keys()


def test_imports_point_down():
    upward = [
        f"{module_name(path) or 'kvjax'} imports {target or 'kvjax'}"
        for path in ROOT.rglob("*.py")
        for target in imported(path)
        if LEVEL[target] >= LEVEL[module_name(path)]
    ]
    assert not upward


def test_storage_and_ops_know_no_model_and_nobody_imports_torch_at_the_top():
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"torch", "lzero"} & {name.split(".")[0] for name in names}, path


def test_every_module_is_imported_without_torch_and_lightzero():
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'lzero', 'ding', 'matplotlib'): sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)"
    )
    names = [f"kvjax.{name}".removesuffix(".") for name in LEVEL]
    env = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    subprocess.run([sys.executable, "-c", code, *names], check=True, env=env)
