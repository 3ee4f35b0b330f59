"""Files that are written whole or not at all."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from kvjax.base import files


def write(path, content=b"new", error=None):
    with files.replacing(path) as file:
        file.write(content)
        if error is not None:
            raise error


def test_the_file_appears_at_the_end_with_the_mode_that_any_new_file_has(tmp_path):
    path, plain = tmp_path / "a.bin", tmp_path / "plain"
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            with files.replacing(path) as file:
                file.write(b"new")
                assert not path.exists()
            plain.write_bytes(b"")
        finally:
            os.umask(before)
        assert path.read_bytes() == b"new"
        assert path.stat().st_mode == plain.stat().st_mode
        path.unlink()
        plain.unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_what_was_there_stays_when_writing_ends_early(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write(path, b"half of the n", error)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    """A limit of the size of files stands for the disk."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}: File too large"):
            write(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("attempt", [write, files.require_writable])
def test_paths_that_cannot_be_written(tmp_path, attempt):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("absent/a.bin", "cannot write .*absent/a.bin: no such folder .*absent"),
        ("folder", "cannot write .*folder: it is a folder"),
        ("pipe", "cannot write .*pipe: it is no file"),
        ("n" * 250, "cannot write .*nnn: File name too long"),
    ):
        with pytest.raises(OSError, match=message):
            attempt(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe"}


def test_who_reads_the_old_file_meanwhile_reads_it_to_its_end(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write(path)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real.bin")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"


def test_what_a_killed_process_leaves_is_told(tmp_path, caplog):
    path = tmp_path / "[a].bin"
    code = (
        "import os, runpy, sys\n"
        "with runpy.run_path(sys.argv[1])['replacing'](sys.argv[2]) as file:\n"
        "    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, files.__file__, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert not left.name.startswith(".")
    for attempt in (files.require_writable, write):
        caplog.clear()
        attempt(path)
        assert f"{left} was never finished" in caplog.text
    assert path.read_bytes() == b"new"


def test_a_process_that_ends_without_unwinding_leaves_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def write():
        with files.replacing(path) as file:
            file.write(b"half")
            assert len(os.listdir(tmp_path)) == 2
            files.discard_unfinished()
            assert os.listdir(tmp_path) == ["a.bin"]

    with pytest.raises(OSError, match="cannot write"):
        write()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]
