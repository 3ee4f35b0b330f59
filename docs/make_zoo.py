"""Tries every UniZero configuration of LightZero and writes zoo.md.

    python docs/make_zoo.py RELEASE MAIN [KEPT]

The folders are clones of LightZero, at v0.2.0 (what is installed of it lacks a few configurations)
and of its main branch. Needs what `make test` installs; takes half an hour of one core. Rows are
added to files in the folder KEPT as they are found, and what is there is not tried again.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
TRIES = DOCS.parent / "tests" / "lightzero_zoo.py"
COLUMNS = ("loads", "searches", "verifies", "attaches")
TITLES = {"release": "Release 0.2.0", "main": "The main branch, August 2026"}

HEAD = """# LightZero's UniZero configurations

Each file is run up to where it would train; LightZero's own classes build its model with random
weights, as wide and deep as it says. Then kvjax

* **loads** it (width x layers),
* **searches**: plays along by observations alone, over slides and a restart; the figure is the
  largest error of the root's policy,
* **verifies** a trace of it, recorded by `kvjax.lightzero.record_trace`; the largest error of all,
* **attaches** to it, in shadow: of how many comparisons with LightZero's own caches all agree.

Where LightZero does not build its own file as it stands, the patch that lets it is named beside the
model. Text encoders are not built: what they would make is drawn in their place. Of models of
several tasks the last task is tried. `python docs/make_zoo.py RELEASE MAIN` writes this page,
`tests/lightzero/test_zoo.py` holds some of it, and all of the release with `KVJAX_FULL=1`.
"""


def rows(folder, kept):
    """What was tried with a clone of LightZero: dictionaries; `kept` has those known before."""
    paths = (folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, str(TRIES), str(kept)], env=environment, check=True)
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    return sorted(found, key=lambda row: row["name"])


def table(title, found):
    """A release's rows in Markdown."""
    lines = [f"\n## {title}\n", "| configuration | model | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    words = [row[column] for row in found for column in COLUMNS]
    refusals = list(dict.fromkeys(x for x in words if x.startswith("refused: ")))
    for row in found:
        model = f"{row['model']}; patched: {row['patches']}" if row["patches"] else row["model"]
        said = [row[column] for column in COLUMNS]
        said = [f"refused, {refusals.index(x) + 1}" if x in refusals else x for x in said]
        cells = (f"`{row['name']}`", model, *said)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = [f"{i}. {x.removeprefix('refused: ')}" for i, x in enumerate(refusals, 1)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def summary(found):
    """How many rows have a figure in each column, in Markdown."""
    counts = {column: sum(row[column][:1].isdigit() for row in found) for column in COLUMNS}
    told = ", ".join(f"{column} {count}" for column, count in counts.items())
    both = sum(row["searches"][:1].isdigit() and row["verifies"][:1].isdigit() for row in found)
    return f"\nOf {len(found)} configurations kvjax {told}; {both} are searched and verified.\n"


def main(release, main_branch, kept=None):
    """Writes the page."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(kept or folder)
        found = {
            "release": rows(release, kept / "release.jsonl"),
            "main": rows(main_branch, kept / "main.jsonl"),
        }
    page = HEAD + summary([row for part in found.values() for row in part])
    page += "".join(table(TITLES[name], part) for name, part in found.items())
    (DOCS / "zoo.md").write_text(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
