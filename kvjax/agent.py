"""Reads an agent from wherever it is: shipped with kvjax, a kvjax file, or a LightZero file."""

import dataclasses
from pathlib import Path
from typing import Any

from kvjax import checkpoint
from kvjax.checkpoint import Checkpoint
from kvjax.config import WindowMode


def read_agent(
    source: str | Path,
    *,
    num_heads: int | None = None,
    context_length: int | None = None,
    window_mode: WindowMode | None = None,
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The agent, and the names of the tensors that inference leaves out.

    Args:
      source: a shipped agent's name, a `.safetensors` file or a LightZero `.pth.tar` file.
      num_heads: what a LightZero file does not tell; a kvjax file must agree with it.
      context_length: likewise, in tokens.
      window_mode: another one than the file says; see `WorldModelConfig`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, or says something else than the arguments.
    """
    path = checkpoint.shipped().get(str(source), Path(source))
    given = {"num_heads": num_heads, "context_length": context_length}
    mode: dict[str, Any] = {} if window_mode is None else {"window_mode": window_mode}
    if path.suffix != checkpoint.SUFFIX:
        from kvjax.lightzero.checkpoint import read

        imported = read(path, **given, **mode)
        return Checkpoint(imported.config, imported.params), imported.ignored
    agent = checkpoint.load(path)
    for name, value in given.items():
        stored = getattr(agent.config, name)
        if value not in (None, stored):
            raise ValueError(f"{path} was converted with {name} {stored}, got {value}")
    config = dataclasses.replace(agent.config, **mode)
    return dataclasses.replace(agent, config=config), ()
