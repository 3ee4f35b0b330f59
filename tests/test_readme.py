"""The Python of the README and of the pages in docs/ runs as printed, block after block."""

import re
from pathlib import Path

import pytest
import torch_models

from kvjax.tools.bench import lightzero_020

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {str(path.relative_to(ROOT)): BLOCK.findall(path.read_text()) for path in FILES}
PAGES = [name for name, blocks in BLOCKS.items() if blocks]
COUNTS = {"README.md": 3, "docs/any_model.md": 6, "docs/lightzero.md": 6, "docs/windows.md": 2}
"""Of pages that would be missed: a block that is not found is not run."""


def test_blocks_are_found():
    assert {name: len(BLOCKS[name]) for name in COUNTS} == COUNTS
    assert not [name for name in BLOCKS if name.startswith("docs/api/") and name in PAGES]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python_blocks(name, data, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    has_model = any("model.world_model" in block for block in BLOCKS[name])
    names: dict[str, object] = {}
    if any(".pth.tar" in block for block in BLOCKS[name]):
        pytest.importorskip("torch")
    if has_model:  # what the reader has
        if not lightzero_020.available():
            pytest.skip("LightZero 0.2.0 is not installed")
        checkpoint = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
        (tmp_path / "ckpt_best.pth.tar").write_bytes(checkpoint.read_bytes())
        names["model"] = torch_models.make()
    for block in BLOCKS[name]:
        exec(compile(block, name, "exec"), names)
    told = capsys.readouterr().out
    assert told or (tmp_path / "tree.html").exists()
    assert name != "docs/windows.md" or "hit rate" in told
