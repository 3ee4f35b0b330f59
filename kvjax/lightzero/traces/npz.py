"""Reads `.npz` archives that may be damaged, or made to do harm.

What a header claims is compared with what is there before anything of that size is made, and each
member is read to its end, so that zip's checksums are looked at.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, Any]

MOST_BYTES = 8 * 2**30
"""Larger traces are refused: a file of a few MB can claim any size."""

_COMPRESSIONS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
"""What numpy writes, and how much a byte can hold at most."""

_SLACK = 64  # bytes, by which a small member may exceed that
_ENCRYPTED = 1  # flag of a member
_END_SIZE, _COUNT = 22, slice(10, 12)
"""Bytes of the record at a zip's end, and those of them that say how many members there are."""

_MOST_COUNTED = 0xFFFF  # in them; more members are counted elsewhere
_SUFFIX = ".npy"
_KINDS = "biufcSU"  # numbers and text; no objects, records or dates
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: str | Path) -> dict[str, Array]:
    """All arrays of an archive by name, each in this machine's byte order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no archive of arrays, is damaged, or larger than `MOST_BYTES`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such trace: {path}")
    if not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(
            f"{path} is {'a folder' if path.is_dir() else 'no file'}, expected a trace"
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            _check_count(file, archive)
            _check_sizes(archive.infolist(), path.stat().st_size)
            return _arrays(archive)
    except PermissionError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for damaged files
        why = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a readable .npz trace: {why}") from error


def check_bytes(what: str, num_bytes: int) -> None:
    """Raises `ValueError` that tells the size unless it is at most `MOST_BYTES`."""
    if num_bytes > MOST_BYTES:
        raise ValueError(
            f"{what}: {num_bytes:,} bytes, kvjax reads traces of at most {MOST_BYTES:,}"
        )


def _check_count(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Refuses a directory in which a damaged entry has swallowed others: zipfile does not count."""
    file.seek(-_END_SIZE - len(archive.comment), io.SEEK_END)
    claimed = int.from_bytes(file.read(_END_SIZE)[_COUNT], "little")
    found = len(archive.infolist())
    if claimed != min(found, _MOST_COUNTED):
        raise ValueError(f"its directory claims {claimed} members and lists {found}")


def _check_sizes(members: list[zipfile.ZipInfo], held: int) -> None:
    """Refuses members that cannot be read, or cannot be in a file of `held` bytes."""
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            raise ValueError(f"{member.filename} is encrypted")
        factor = _COMPRESSIONS.get(member.compress_type)
        if factor is None:
            raise ValueError(f"{member.filename} has an unknown compression {member.compress_type}")
        if member.file_size > factor * member.compress_size + _SLACK:
            raise ValueError(
                f"{member.filename} claims {member.file_size:,} bytes in {member.compress_size:,}"
            )
    packed = sum(member.compress_size for member in members)
    if packed > held:
        raise ValueError(f"its arrays claim {packed:,} bytes of a file of {held:,}")
    check_bytes("its arrays are too large", sum(member.file_size for member in members))


def _arrays(archive: zipfile.ZipFile) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for member in archive.infolist():
        content, name = _content(archive, member), member.filename.removesuffix(_SUFFIX)
        if name in arrays:
            raise ValueError(f"two arrays are called {name}")
        if name != member.filename:  # else no array, and nobody asks for it
            arrays[name] = _array(name, content)
    return arrays


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as stream:
        content = stream.read(member.file_size)  # to the end: the checksum is compared there
    if len(content) != member.file_size:
        raise ValueError(f"{member.filename} ends early")
    return content


def _array(name: str, content: bytes) -> Array:
    header = io.BytesIO(content)
    version = np.lib.format.read_magic(header)
    if version not in _HEADERS:
        raise ValueError(f"{name} has an unknown version {version}")
    shape, in_columns, dtype = _HEADERS[version](header)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{name} holds {dtype}, expected numbers or text")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has an impossible shape {shape}")
    claimed, held = math.prod(shape) * dtype.itemsize, len(content) - header.tell()
    if claimed != held:
        raise ValueError(f"{name} claims {claimed:,} bytes, shape {shape}; it holds {held:,}")
    flat = np.frombuffer(content, dtype, offset=header.tell())
    return flat.reshape(shape, order="F" if in_columns else "C").astype(dtype.newbyteorder("="))
