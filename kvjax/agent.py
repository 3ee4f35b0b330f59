"""Reads an agent from wherever it is: shipped with kvjax, a kvjax file, or a LightZero file."""

from pathlib import Path

from kvjax import checkpoint
from kvjax.checkpoint import Checkpoint


def read_agent(
    source: str | Path, *, num_heads: int | None = None, context_length: int | None = None
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The agent, and the names of the tensors that inference leaves out.

    Args:
      source: a shipped agent's name, a `.safetensors` file or a LightZero `.pth.tar` file.
      num_heads: what a LightZero file does not tell; a kvjax file must agree with it.
      context_length: likewise, in tokens.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, or says something else than the arguments.
    """
    path = checkpoint.shipped().get(str(source), Path(source))
    given = {"num_heads": num_heads, "context_length": context_length}
    if path.suffix != checkpoint.SUFFIX:
        from kvjax.lightzero.checkpoint import read

        imported = read(path, **given)
        return Checkpoint(imported.config, imported.params), imported.ignored
    agent = checkpoint.load(path)
    for name, value in given.items():
        stored = getattr(agent.config, name)
        if value not in (None, stored):
            raise ValueError(f"{path} was converted with {name} {stored}, got {value}")
    return agent, ()
