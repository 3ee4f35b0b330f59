"""Tries every UniZero configuration of LightZero and writes zoo.md.

    python docs/make_zoo.py [FOLDER]

Release 0.2.0 is taken as it is installed. FOLDER is a clone of LightZero's main branch; without one
its rows are left out. Needs what `make test` installs; takes half an hour.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
TRIES = DOCS.parent / "tests" / "lightzero_zoo.py"
COLUMNS = ("loads", "searches", "verifies", "attaches")

HEAD = """# LightZero's UniZero configurations

Each file is run up to where it would train; LightZero's own classes build its model with random
weights, as wide and deep as it says. Then kvjax

* **loads** it (width x layers),
* **searches**: plays along by observations alone, over slides and a restart; the figure is the
  largest error of the root's policy,
* **verifies** a trace of it, recorded by `kvjax.lightzero.record_trace`; the largest error of all,
* **attaches** to it, in shadow: of how many comparisons with LightZero's own caches all agree.

Where LightZero does not build its own file as it stands, the patch that lets it is named beside the
model. `python docs/make_zoo.py FOLDER` writes this page, `tests/lightzero/test_zoo.py` holds some
of it.
"""


def rows(folder=None):
    """What was tried with a release: dictionaries."""
    paths = [*([folder] if folder else []), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = subprocess.run(
        [sys.executable, str(TRIES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def table(title, found):
    """A release's rows in Markdown."""
    lines = [f"\n## {title}\n", "| configuration | model | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    for row in found:
        model = f"{row['model']}; patched: {row['patches']}" if row["patches"] else row["model"]
        cells = (f"`{row['name']}`", model, *(row[column] for column in COLUMNS))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Writes the page."""
    page = HEAD + table("Release 0.2.0", rows())
    if len(sys.argv) > 1:
        page += table("The main branch", rows(sys.argv[1]))
    (DOCS / "zoo.md").write_text(page)


if __name__ == "__main__":
    main()
