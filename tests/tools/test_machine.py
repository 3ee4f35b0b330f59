"""Devices, and what was compiled and kept: processes of their own, as jax begins only once."""

import json
import os
import stat
import subprocess
import sys

import pytest
from conftest import HERE

from kvjax.config import SearchConfig
from kvjax.tools import machine
from kvjax.tools.play import play

ONE = SearchConfig(num_simulations=1)


def run(code, **env):
    """What a process prints, and what it says beside it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    kept |= {"PYTHONPATH": str(HERE.parent)} | env
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


PLAY = """
import sys
from kvjax.tools import cli, routes
make = routes.init_contexts

def watched(*args, mesh):
    contexts = make(*args, mesh=mesh)
    print(len(contexts.timestep.devices()), "devices", file=sys.stderr)
    return contexts

routes.init_contexts = watched
cli.main("play --episodes 3 --simulations 1 --devices 2 --json".split())
"""


def test_play_on_two_devices(masked_agent):
    """The same episodes, of which one is over and another begins in its place."""
    out, told = run(PLAY, **{name: x for name, x in os.environ.items() if name.startswith("JAX_")})
    wanted = play(masked_agent, episodes=3, search_config=ONE)
    assert json.loads(out)["returns"] == list(wanted.returns)
    assert "2 devices" in told


KEEP = """
from kvjax.tools import machine
machine.keep_compiled()
import jax
jax.jit(lambda x: x + 1)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


def test_what_was_compiled_is_kept(tmp_path):
    """And a file that is damaged is compiled again without a word."""
    told = [run(KEEP, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    folder = tmp_path / "kvjax" / "jax"
    assert told == [(f"{folder}\n", "")] * 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.glob("*-cache"))
    assert files
    for file in files:
        file.write_bytes(b"damaged")
    assert run(KEEP, XDG_CACHE_HOME=str(tmp_path)) == (f"{folder}\n", "")


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "HOME"])
def test_the_folder(monkeypatch, tmp_path, name):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its standard has ignored
    monkeypatch.setenv(name, str(tmp_path))
    above = tmp_path if name == "XDG_CACHE_HOME" else tmp_path / ".cache"
    assert machine._folder() == above / "kvjax" / "jax"


def test_a_folder_that_cannot_be(monkeypatch, tmp_path):
    (tmp_path / "kvjax").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine._folder() is None


def test_jaxs_own_setting_comes_first(monkeypatch):
    monkeypatch.setattr(machine, "_folder", lambda: pytest.fail("asked"))
    machine.keep_compiled()  # tests have JAX_COMPILATION_CACHE_DIR


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match="devices must be at most 1 here, got 2"):
        machine.mesh_of(2)
