"""What mkdocs does not do by itself: pages of notebooks, examples, files beside docs/, and links.

Links in docs/ are written for a reader of the repository (`../notebooks/01_windows.ipynb`); here
they are turned to the pages that come of what they point to. A name of the API that is written as
code becomes a link to its description.
"""

import ast
import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BESIDE = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")
NAME = re.compile(r"(?<![\[`\w])`(kvjax(?:\.\w+)+)(?:\(\))?`(?!`)")


def page_of(path: str) -> str | None:
    """The page, as a path below docs/, that comes of a file of the repository."""
    name = Path(path)
    if path in BESIDE:
        return BESIDE[path]
    if path == "README.md":
        return "index.md"
    if name.parts[0] == "docs":
        return posixpath.relpath(path, "docs")
    if name.parts[0] in ("notebooks", "examples"):
        return str(name.with_suffix(".md") if name.suffix in (".ipynb", ".py") else name)
    return None


def relinked(text: str, source: str, page: str) -> str:
    """Markdown whose links, relative to its source, lead from the page to what comes of them."""

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        there = page_of(target)
        if there is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(there, posixpath.dirname(page))}{match[3] or ''})"

    return LINK.sub(turned, text)


def sources() -> dict[str, str]:
    """Files of the repository that become pages without lying in docs/, by page."""
    found = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("examples/*.py")]
    found += [ROOT / name for name in BESIDE if (ROOT / name).exists()]
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return {page: name for name in names if (page := page_of(name)) is not None}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that do not lie in docs/."""
    from mkdocs.structure.files import File  # so that tests without mkdocs read this file

    for page, name in sources().items():
        text, pictures = _page(ROOT / name, page)
        files.append(File.generated(config, page, content=relinked(text, name, page)))
        for picture, content in pictures.items():
            files.append(File.generated(config, picture, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links of pages in docs/, and links what the API describes."""
    path = page.file.src_uri
    if path not in sources():
        markdown = relinked(markdown, f"docs/{path}", path)
    return _named(markdown, described())


def on_page_content(html: str, **_: Any) -> str:
    """Says where names of tests and endless numbers may break, so that tables stay narrow."""
    html = re.sub(r"(?<=<code>)tests/[^<]*", lambda m: re.sub(r"(?=[/_]|::)", "<wbr>", m[0]), html)
    return re.sub(r"\d{60,}", lambda m: re.sub(r"(\d{30})", r"\1<wbr>", m[0]), html)


def _named(markdown: str, known: set[str]) -> str:
    """With links of known names, outside of code, headings and links."""
    parts = re.split(r"(^```.*?^```$|^#.*?$|\[[^\]]*\]\([^)]*\))", markdown, flags=re.M | re.S)
    for at in range(0, len(parts), 2):
        parts[at] = NAME.sub(
            lambda m: f"[{m[0]}][{m[1]}]" if m[1] in known else m[0],
            parts[at],
        )
    return "".join(parts)


def described() -> set[str]:
    """Names that the pages of docs/api/ describe."""
    text = "".join(path.read_text() for path in sorted(ROOT.glob("docs/api/*.md")))
    names = re.findall(r"^::: (\S+)$", text, re.M)
    members = [f"{name}.{member}" for name in names for member in _members(name)]
    return {*names, *members}


def _members(name: str) -> list[str]:
    path = ROOT / f"{name.replace('.', '/')}.py"
    body = ast.parse(path.read_text()).body if path.exists() else []
    named = [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return [name for name in named if not name.startswith("_")]


def _page(path: Path, page: str) -> tuple[str, dict[str, bytes]]:
    """A file as markdown, and pictures of it by path."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        return _notebook(json.loads(text), page)
    if path.suffix == ".py":
        told = ast.get_docstring(ast.parse(text)) or ""
        title = told.splitlines()[0].rstrip(".")
        return f"# {path.name}\n\n{title}.\n\n```python\n{text}```\n", {}
    return text, {}


def _notebook(notebook: dict[str, Any], page: str) -> tuple[str, dict[str, bytes]]:
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_output(output, page, pictures))
    return "\n\n".join(parts) + "\n", pictures


def _output(output: dict[str, Any], page: str, pictures: dict[str, bytes]) -> str:
    """What a cell gave, as its richest kind."""
    data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
    if "image/png" in data:
        name = f"{posixpath.splitext(page)[0]}_{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![what the cell above draws]({posixpath.basename(name)})"
    if "text/html" in data:
        return f'<div class="output" markdown="0">\n{data["text/html"]}\n</div>'
    text = data.get("text/plain") or "".join(output.get("text", ""))
    return f"```text\n{text.rstrip()}\n```"
