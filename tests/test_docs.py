"""The pages of docs/ say what is so: what they name exists, and generated ones are current."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import pytest

import kvjax
from kvjax.store import statistics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RULES = (DOCS / "rules.md").read_text()
ERRORS = (DOCS / "errors.md").read_text()
ARCHITECTURE = (DOCS / "architecture.md").read_text()
COMPOSITION = (DOCS / "composition.md").read_text()
ANY_MODEL = (DOCS / "any_model.md").read_text()
README_FILE, CHANGES = ROOT / "README.md", ROOT / "CHANGELOG.md"
README = README_FILE.read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
sys.path.append(str(DOCS / "site"))
hooks = importlib.import_module("hooks")
CHEAP = ("tests/ops/test_window.py", "tests/ops/test_position.py", "tests/ops/test_hashing.py")


def all_tests():
    """All test functions of a file, methods as Class::name."""

    def names(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{prefix}::{node.name}")
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                yield f"{prefix}::{node.name}"

    return {
        name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in names(ast.parse(path.read_text()).body, str(path.relative_to(ROOT)))
    }


def lookup(name):
    """What a dotted name means: an attribute where there is one, else a module."""
    found, path = kvjax, "kvjax"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


def test_every_rule_has_a_row_and_what_it_names_exists():
    lines = [line for line in RULES.splitlines() if line.startswith("| S")]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [f"S{n}" for n in range(1, 17)]
    tests = re.findall(r"`(tests/[^`]*)`", RULES)
    assert len(tests) >= 16
    assert not set(tests) - all_tests()
    functions = re.findall(r"`(kvjax\.[\w.]+)`", RULES)
    assert all(callable(lookup(name)) for name in functions)
    for line in lines:
        assert "`kvjax." in line, line
        assert "`tests/" in line, line


def test_the_table_of_compositions_names_every_test_of_one():
    lines = [line for line in COMPOSITION.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 15
    named = [re.findall(r"`(tests/[^`]*)`", line) for line in lines]
    assert all(named)
    tests = {name for name in all_tests() if name.startswith("tests/test_composition.py")}
    assert {name for names in named for name in names} == tests
    assert all(callable(lookup(name)) for name in re.findall(r"`(kvjax\.[\w.]+)`", COMPOSITION))


def test_at_least_fifty_errors_and_their_tests_exist():
    lines = [line for line in ERRORS.splitlines() if re.match(r"\| \w+(Error|Exception) \|", line)]
    assert len(lines) >= 50
    for section in ERRORS.split("\n## "):
        rows = [line for line in section.splitlines() if line in lines]
        assert len(set(rows)) == len(rows)
    tests = {re.search(r"`([^`]*)` \|$", line)[1] for line in lines}
    assert not tests - all_tests()
    assert "/tmp" not in ERRORS


def test_errors_are_current():
    command = [sys.executable, DOCS / "make_errors.py", *CHEAP]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    fresh = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    kept = [line for line in ERRORS.splitlines() if any(f"`{name}:" in line for name in CHEAP)]
    assert len(fresh) >= 10
    assert fresh == kept


def test_the_picture_is_current():
    done = subprocess.run(
        [sys.executable, "-c", "import draw_picture; print(draw_picture.picture(), end='')"],
        cwd=DOCS,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (DOCS / "picture.svg").read_text() == done.stdout


def test_files_that_the_pages_name_exist():
    text = README + ARCHITECTURE + CONTRIBUTING
    names = re.findall(r"`((?:[\w]+/)*\w+\.(?:py|ipynb|md|svg))`", text)
    assert len(names) > 10
    missing = [n for n in names if not ((ROOT / n).exists() or (ROOT / "kvjax" / n).exists())]
    assert not missing
    assert not [name for name in re.findall(r"`(kvjax\.[\w.]+)`", ANY_MODEL) if not lookup(name)]


def anchors(text):
    """Those of a page's headings, as sites and repositories make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text):
    """Targets of a page's links and pictures, and their anchors; code has none."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", prose)


def prose_of(path):
    """A page's markdown; a notebook's, without its code."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")


PAGES = [README_FILE, CHANGES, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES += sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """In the repository, and on the site once its hooks have turned them."""
    told = prose_of(page)
    for name, anchor in links(told):
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), name
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{name}#{anchor}"
    if page == README_FILE:
        return
    source = str(page.relative_to(ROOT))
    here = hooks.page_of(source)
    for name, _ in links(hooks.relinked(told, source, here)):
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), name)) if name else here
        assert (DOCS / there).exists() or there in hooks.sources(), name


def test_links_are_turned_to_where_pages_lie_on_the_site():
    text = "[a](../notebooks/01_windows.ipynb#b) [c](../../CHANGELOG.md) [d](https://e.f) `x`(g.py)"
    turned = hooks.relinked(text, "docs/api/search.md", "api/search.md")
    assert turned == text.replace("../../CHANGELOG.md", "../changes.md")
    turned = hooks.relinked(text, "docs/windows.md", "windows.md")
    assert turned.startswith("[a](notebooks/01_windows.md#b) [c](../../CHANGELOG.md)")
    named = hooks._named("`kvjax.search` [`kvjax.search`](x) `kvjax.no`", {"kvjax.search"})
    assert named == "[`kvjax.search`][kvjax.search] [`kvjax.search`](x) `kvjax.no`"


def test_notebooks_become_pages_with_their_outputs():
    text, pictures = hooks._page(ROOT / "notebooks" / "02_search.ipynb", "notebooks/02_search.md")
    assert list(pictures) == ["notebooks/02_search_0.png"]
    assert pictures["notebooks/02_search_0.png"].startswith(b"\x89PNG")
    assert text.count("```") % 2 == 0
    assert "](02_search_0.png)" in text
    assert '<div class="output" markdown="0">' in text


def test_every_page_has_its_place_on_the_site():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    placed = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | set(hooks.sources())
    assert sorted(placed) == sorted(pages)


def test_every_public_name_has_its_place_in_the_api():
    told = "".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
    entries = re.findall(r"^::: (\S+)$", told, re.MULTILINE)
    assert len(set(entries)) == len(entries)
    assert all(lookup(name) is not None for name in entries)
    top = {f"kvjax.{name}": getattr(kvjax, name) for name in kvjax.__all__}
    names = {name for name, value in top.items() if not inspect.ismodule(value)}
    for name in top.keys() - names:
        module = top[name]
        names |= {f"{name}.{part}" for part in getattr(module, "__all__", defined_in(module))}
    assert len(names) > 40
    assert not names - set(entries)


def defined_in(module):
    """Functions and public classes that a module without a list of names makes itself."""
    made = {name: x for name, x in vars(module).items() if not name.startswith("_")}
    return [name for name, x in made.items() if getattr(x, "__module__", "") == module.__name__]


CONFIGURATIONS = [
    kvjax.SearchConfig,
    kvjax.WindowConfig,
    kvjax.WorldModelConfig,
    kvjax.checkpoint.Checkpoint,
]


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_fields_of_configurations_are_told(kind):
    """In the docstring, or in the comment behind them, which the site lists."""
    source, told = inspect.getsource(kind), inspect.getdoc(kind)
    for field in dataclasses.fields(kind):
        line = re.search(rf"^    {field.name}: .*$", source, re.MULTILINE)[0]
        assert "#" in line or f"`{field.name}`" in told, field.name


def test_the_table_of_statistics_is_current():
    sys.path.append(str(DOCS))
    import make_statistics

    assert make_statistics.table() in (DOCS / "statistics.md").read_text()


def test_the_page_of_a_search_is_current():
    """But for its numbers, which are rounded here and there."""
    template = (ROOT / "kvjax" / "mcts" / "explorer.html").read_text()
    before, after = template.split("/*SEARCH*/")
    kept = (DOCS / "tree.html").read_text()
    assert kept.startswith(before.partition("<!--TITLE-->")[0])
    assert kept.endswith(after)
    assert before.partition("<!--TITLE-->")[2] in kept


def public():
    """Functions and classes of `kvjax.__all__`, and functions of the modules of `kvjax.ops`."""
    named = {f"kvjax.{name}": getattr(kvjax, name) for name in kvjax.__all__}
    for module in (getattr(kvjax.ops, name) for name in kvjax.ops.__all__):
        for name, value in vars(module).items():
            if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_"):
                named[f"{module.__name__}.{name}"] = value
    return [pytest.param(x, id=name) for name, x in named.items() if not inspect.ismodule(x)]


SHAPE = re.compile(r"\[[^\]\n]*\]")
ERRORS_OF_A_STORE = {"CacheMissError", "StepInterrupt", "StoreFullError"}
NO_ARRAYS = {*ERRORS_OF_A_STORE, "SearchConfig", "WindowConfig", "WorldModelConfig", "stats"}


@pytest.mark.parametrize("item", public())
def test_public_docstrings_give_shapes(item):
    text = inspect.getdoc(item)
    assert text
    assert SHAPE.search(text) or item.__name__ in NO_ARRAYS, f"no shapes:\n{text}"


STATIC = ("Config", "TreeModel")
STATES = [
    x
    for x in public()
    if dataclasses.is_dataclass(x.values[0]) and not any(name in x.id for name in STATIC)
]


@pytest.mark.parametrize("state", STATES)
def test_fields_are_told_where_help_and_editors_show_them(state):
    """In the docstring, in order, arrays with their shapes; comments are seen by nobody."""
    attributes = inspect.getdoc(state).partition("Attributes:\n")[2]
    told = dict(re.findall(r"^  (\w+): (.+)$", attributes, re.MULTILINE))
    fields = {
        field.name: (field.type, *get_args(field.type)) for field in dataclasses.fields(state)
    }
    assert list(told) == list(fields)
    array = Any if state is kvjax.Root else jax.Array  # roots may lie on the host
    arrays = {name for name, types in fields.items() if array in types}
    assert not [name for name in arrays if not SHAPE.search(told[name])]
    assert arrays


def test_every_counter_is_told():
    told = inspect.getdoc(statistics.Statistics).partition("Keys:\n")[2]
    names = re.findall(r"\w+", " ".join(re.findall(r"^  ([\w, ]+):", told, re.MULTILINE)))
    pools = ["roots_stored", "roots_slots", "nodes_stored", "nodes_slots"]
    assert names == [*statistics.COUNTERS, *pools]
