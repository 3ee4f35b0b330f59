"""Packages, and which of them may import which."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import kvjax

MAY_IMPORT = {
    "base": set(),
    "config": {"base"},
    "ops": {"config", "base"},
    "store": {"config", "base", "ops"},
    "model": {"config", "base", "ops"},
    "mcts": {"config", "base", "ops", "store", "model"},
    "lightzero": {"config", "base", "ops", "store", "model"},
    "train": {"config", "base", "ops", "model", "mcts"},
    "tools": {"config", "base", "ops", "store", "model", "mcts", "lightzero", "train", "kvjax"},
}
"""Which package may import which; a storage knows no model, a tree no storage's insides."""

ROOT = Path(kvjax.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(module):
    """kvjax modules that a module imports as it is imported itself."""
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvjax":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("kvjax") for alias in node.names), module


def package(module):
    return [*module.split("."), "kvjax"][1]


def test_the_top_is_a_table_of_contents():
    entries = {path.name for path in ROOT.iterdir()} - {"__pycache__"}
    assert entries == {"__init__.py", "py.typed", *MAY_IMPORT}


def test_packages_import_what_they_may():
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        for target in imported(module)
        if package(module) in MAY_IMPORT
        and package(target) not in MAY_IMPORT[package(module)] | {package(module)}
    ]
    assert not wrong


def test_no_module_imports_itself_around_a_corner():
    needs = {module: set(imported(module)) - {module} for module in MODULES}
    faces = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    for module in faces - {"kvjax"}:  # a face imports what lies behind it
        needs[module] = set()
    list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError


def test_nobody_imports_torch_at_the_top():
    for path in MODULES.values():
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
    env = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    subprocess.run([sys.executable, "-c", code, *MODULES], check=True, env=env)
