"""Torch's `.pth.tar` files: read weights-only, and only when they are whole."""

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.base.values import require

_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises for members that it cannot read."""

_FORBIDDEN = r"GLOBAL (\S+)"
"""How torch names what weights-only reading refuses."""


def read(path: Path) -> Mapping[str, Any]:
    """The dictionary that a torch file holds, its tensors on the CPU.

    Raises:
      FileNotFoundError: no such file.
      ImportError: torch is not installed.
      ValueError: the file is damaged, is no dictionary, or holds more than weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading the torch file {path} needs torch (pip install torch); or convert it once"
            " with `kvjax convert` where torch is installed"
        ) from error
    check_sums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for truncated or foreign files
        raise ValueError(_reason(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def check_sums(path: Path) -> None:
    """Compares each member's checksum with its bytes, which `torch.load` does not.

    Files in torch's format of before 1.6, and those written with
    `torch.serialization.set_crc32_options(False)`, have none.

    Raises:
      ValueError: a member is damaged, or claims to be larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            claimed, size = sum(m.file_size for m in members), path.stat().st_size
            require(claimed <= size, f"its members claim {claimed} bytes, it has {size}")
            if any(member.CRC for member in members):
                damaged = archive.testzip()
                require(damaged is None, f"{damaged} is not what was written (checksum)")
    except _DAMAGES as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _reason(path: Path, error: Exception) -> str:
    forbidden = re.search(_FORBIDDEN, str(error))
    if forbidden and forbidden[1].startswith("numpy."):
        return (
            f"{path} holds numbers of numpy ({forbidden[1]}) beside its weights, which torch's"
            " weights-only reading refuses; if you trust the file, pass its model:"
            ' load(torch.load(path, weights_only=False)["model"], ...)'
        )
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return f"{path} is not a readable torch checkpoint (truncated, or more than weights): {first}"
