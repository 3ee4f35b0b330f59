"""The README's Python runs as printed, one block after the other."""

import re
from pathlib import Path

import pytest
import torch_models

from kvjax.tools.bench import lightzero_020

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.skipif(not lightzero_020.available(), reason="LightZero 0.2.0 is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python_blocks(data, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = data / "cartpole_masked_lightzero_0.2.0.pth.tar"
    (tmp_path / "ckpt_best.pth.tar").write_bytes(checkpoint.read_bytes())
    names: dict[str, object] = {"model": torch_models.make()}  # what the reader has
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    assert len(BLOCKS) == 5
    assert "hit rate" in capsys.readouterr().out
