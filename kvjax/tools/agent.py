"""Reads an agent from wherever it is: shipped with kvjax, a kvjax file, or a LightZero file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.base.values import require
from kvjax.config import EnvironmentConfig
from kvjax.lightzero.checkpoint import tasks
from kvjax.lightzero.checkpoint.described import CLIP
from kvjax.lightzero.checkpoint.reading import SAID, check_names, read
from kvjax.model import checkpoint
from kvjax.model.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Found:
    """An agent, and where it is from."""

    agent: Checkpoint
    ignored: tuple[str, ...]  # tensors that inference leaves out
    origins: Mapping[str, str]  # fields of the configuration: "as you said", "from ..."


def read_agent(source: str | Path, **options: Any) -> tuple[Checkpoint, tuple[str, ...]]:
    """The agent that `find_agent` finds, and the names of the tensors that inference leaves out."""
    found = find_agent(source, **options)
    return found.agent, found.ignored


def find_agent(
    source: str | Path, *, env: str | None = None, encoder: str | None = "own", **options: Any
) -> Found:
    """Reads an agent, and says where each field of its configuration is from.

    Args:
      source: a shipped agent's name, a `.safetensors` file or a LightZero `.pth.tar` file.
      env: the environment to play, see `kvjax.checkpoint.load`.
      encoder: None leaves the encoder of a LightZero file out, see `kvjax.lightzero.load`.
      **options: those of `kvjax.lightzero.load` that are not None: what a LightZero file does not
        tell, as `num_heads` and `context_length`. A kvjax file must agree, but for `window_mode`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, or says something else than the arguments.
    """
    path = checkpoint.shipped().get(str(source), Path(source))
    said = {name: value for name, value in options.items() if value is not None}
    if path.suffix == checkpoint.SUFFIX:
        require(encoder is not None, f"{path} is kvjax's: its encoder is read with it")
        return _find_own(path, said, env)
    imported = read(path, encoder=encoder, **said)
    environment = imported.environment
    if env is not None and (environment is None or environment.env_id != env):
        environment = EnvironmentConfig(env)
    agent = Checkpoint(imported.config, imported.params, environment, imported.notes)
    return Found(agent, imported.ignored, imported.origins)


def _find_own(path: Path, said: dict[str, Any], env: str | None) -> Found:
    said.pop(CLIP, None)  # told by the file's notes, if it was meant
    for name in (tasks.TASK, tasks.OPTION):
        require(name not in said, f"{path} holds one task: {name} is for LightZero's files")
    check_names(said)
    agent = checkpoint.load(path, env=env)
    stored = dataclasses.asdict(agent.config)
    is_shipped = path in checkpoint.shipped().values()
    here = f"from the shipped {path.stem}" if is_shipped else f"from {path}"
    origins = dict.fromkeys(stored, here) | dict.fromkeys(said, SAID)
    mode = {name: said.pop(name) for name in ("window_mode",) if name in said}
    for name, value in said.items():
        if value != stored[name]:
            raise ValueError(f"{path} was converted with {name} {stored[name]}, got {value}")
    config = dataclasses.replace(agent.config, **mode)
    return Found(dataclasses.replace(agent, config=config), (), origins)
