"""A short evaluation over processes and devices is that of one device."""

import os

import pytest
import two_processes
from conftest import FULL, HERE


@pytest.mark.skipif(not FULL, reason="each process compiles anew")
def test_as_on_one_device(monkeypatch, capfd):
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    two_processes.main("--episodes", "4", "--simulations", "2")
    told = capfd.readouterr().out
    assert "searches as on one device" in told
    assert " 0 searches" not in told
