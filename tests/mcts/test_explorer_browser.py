"""The page of a search in a real browser: keys and clicks do what the page says they do."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_explorer import ACTIONS, facts, searched

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")

SIMULATIONS = 12
HEAD = "<head><script>var failed = []; onerror = text => failed.push(text);</script>"
DRIVE = """<script>
const told = [], text = id => $(id).textContent;
const tell = () => told.push([now, selected, text("status"), text("node")]);
const press = key => { dispatchEvent(new KeyboardEvent("keydown", { key })); tell(); };
tell();
for (const key of ["Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowUp"]) press(key);
select(0); press("ArrowDown"); press("]"); press("[");
$("slider").value = 3; $("slider").oninput({ target: $("slider") }); tell();
$("next").click(); tell();
nodes[1].g.onclick(); tell();
document.querySelector("#windows .r").click(); tell();
go(S); select(0);
const rows = [...$("actions").rows].map(row => [...row.cells].map(cell => cell.textContent));
document.body.replaceChildren(JSON.stringify({ failed, told, rows }));
</script></body>"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """The search's facts, and what the page told after each key and click."""
    folder, out = tmp_path_factory.mktemp("page"), searched(SIMULATIONS)
    page = out.to_html(row=1).replace("<head>", HEAD).replace("</body>", DRIVE)
    (folder / "page.html").write_text(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command = [BROWSER, *options, f"--user-data-dir={folder}", f"file://{folder}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return facts(out, 1), json.loads(re.search(r"<body>(.*?)</body>", done.stdout, re.S)[1])


def test_keys_and_clicks(driven):
    told, seen = driven
    assert seen["failed"] == []
    ends = [0, *(step[-1][0] for step in told["steps"])]  # the node that each simulation made
    parent = told["nodes"][ends[-1]]["p"]
    below = [n for n, _, _ in told["end"] if told["nodes"][n]["p"] == 0]
    below.sort(key=lambda n: told["nodes"][n]["a"])
    visits = {n: v for n, v, _ in told["end"]}
    most = max(below, key=visits.get)
    beside = below[(below.index(most) + 1) % len(below)]
    last = SIMULATIONS
    wanted = [
        *((last, 0), (0, 0), (1, ends[1]), (2, ends[2]), (1, ends[1]), (last, ends[-1])),
        *((last, parent), (last, most), (last, beside), (last, most)),
        *((3, ends[3]), (4, ends[4]), (4, 1), (4, 0)),
    ]
    assert [(now, node) for now, node, _, _ in seen["told"]] == wanted
    for now, node, story, title in seen["told"]:
        assert title == (f"Node {node}" if node else "Root")
        assert story.startswith(f"Simulation {now} of {last}" if now else "Before the first")


def test_the_roots_table_is_the_searchs(driven):
    told, seen = driven
    assert len(seen["rows"]) == ACTIONS
    assert [int(row[1]) for row in seen["rows"]] == told["visits"]
    np.testing.assert_allclose([float(row[4]) for row in seen["rows"]], told["nodes"][0]["P"], 1e-2)
