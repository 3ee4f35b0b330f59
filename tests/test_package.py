"""kvjax as an installed package: where it is found from, what it says of itself."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvjax
from kvjax.tools import cli

ROOT = Path(__file__).parent.parent


def test_a_folder_called_kvjax_does_not_hide_the_package(tmp_path):
    """As when Python starts in the folder above a clone; a finder hook would come too late."""
    (tmp_path / "kvjax").mkdir()
    code = "import kvjax; print(kvjax.__version__, kvjax.checkpoint.load.__name__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kvjax.__version__, "load"]


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"kvjax {kvjax.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", kvjax.__version__)
    assert f"\nversion: {kvjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_package_index_is_shown_no_picture_and_no_link_that_it_lacks():
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    text = (ROOT / "README.md").read_text()
    assert re.search(r"!\[", text)
    for change in hooks["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert not re.search(r"!\[", text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
