"""The command's first lines: interrupts, imports that fail, an output that nobody reads.

A stand-in for the package takes its place, so that each runs in a moment.
"""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LEAVE = "def leave(): print('measured so far', flush=True)\n"
COMMAND = "import sys; from kvjax_command import main; sys.argv[1:] = ['play']; sys.exit(main())"


@pytest.fixture
def start(tmp_path):
    """Starts the command with this text as `kvjax.tools.cli`."""

    def start(text, shell="true", **options):
        tools = tmp_path / "kvjax" / "tools"
        tools.mkdir(parents=True)
        for package in (tools.parent, tools):
            (package / "__init__.py").touch()
        (tools / "cli.py").write_text(text)
        env = (
            os.environ
            | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONUNBUFFERED": ""}
            | options.pop("env", {})
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = ["sh", "-c", f'{shell}; exec "$@"', "sh", sys.executable, "-c", COMMAND]
        return subprocess.Popen(command, env=env, cwd=tmp_path, **pipes)

    return start


def ended(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out.decode() if out is not None else None, err.decode()


def test_the_entry_point_imports_neither_the_package_nor_jax():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["kvjax"].split(":")
    heavy = f"import sys, {module} as m; m.{function}; print({{'jax', 'kvjax'}} & {{*sys.modules}})"
    command = [sys.executable, "-c", heavy]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "set()\n"


SLEEP = "import time; print('ready', flush=True); time.sleep(60)\n"
DEAF = """import time; print('ready', flush=True)
while True:
  try: time.sleep(60)
  except BaseException: pass
"""


def indented(text):
    return "".join(f"  {line}\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SLEEP, ""),  # while the package is imported
        (DEAF, ""),
        (LEAVE + "def main():\n" + indented(SLEEP), "measured so far\n"),
        (LEAVE + "def main():\n" + indented(DEAF), "measured so far\n"),
        ("def leave(): 1 / 0\ndef main():\n" + indented(SLEEP), ""),
        ("def leave():\n" + indented(DEAF) + "def main():\n" + indented(SLEEP), "ready\n"),
    ],
)
def test_an_interrupt_ends_the_process_at_once(start, text, told):
    process = start(text)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, told)
    assert "KeyboardInterrupt" not in err
    assert err.endswith("kvjax play: interrupted\n") or told == "ready\n" or "leave(): 1" in text


def test_an_ignored_interrupt_stays_ignored(start):
    """As in the background of a script."""
    text = LEAVE + "import time\ndef main():\n  print('ready', flush=True); time.sleep(1); return 0"
    process = start(text, shell="trap '' INT")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "", "")


@pytest.mark.parametrize("error", ["ValueError", "ImportError", "OSError", "RuntimeError"])
def test_an_import_that_fails_is_one_line(start, error):
    process = start(f"raise {error}('no\\nsuch thing')")
    assert ended(process) == (2, "", "kvjax: no such thing\n")


def test_a_fault_of_the_program_stays_a_traceback(start):
    code, _, err = ended(start("def leave(): pass\ndef main(): 1 / 0"))
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(("code", "returned"), [(0, "0"), (1, "1"), (2, "sys.exit(2)")])
def test_exit_codes(start, code, returned):
    text = f"import sys\n{LEAVE}def main():\n  print('é\\udcff'); return {returned}"
    process = start(text, env={"PYTHONIOENCODING": "ascii"})
    assert ended(process) == (code, "\\xe9\\udcff\n", "")


def test_an_output_that_nobody_reads(start):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(LEAVE + "def main(): print('result'); return 0", stdout=writer)
    os.close(writer)
    assert ended(process) == (2, None, "kvjax: standard output: Broken pipe\n")


def test_a_full_disk_behind_standard_output(start):
    with open("/dev/full", "w") as full:
        process = start(LEAVE + "def main(): print('result'); return 0", stdout=full)
        assert ended(process) == (2, None, "kvjax: standard output: No space left on device\n")


def test_closed_outputs(start):
    process = start("", shell="exec 1>&-")
    assert ended(process) == (2, "", "kvjax: standard output is closed\n")


def test_a_closed_standard_error(start):
    text = LEAVE + "import sys\ndef main(): print('x', file=sys.stderr); print('y'); return 0"
    assert ended(start(text, shell="exec 2>&-")) == (0, "y\n", "")
