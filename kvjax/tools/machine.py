"""What a command takes of the machine: devices, and a folder for what was compiled."""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import jax

from kvjax.base.values import require

_config: Any = jax.config
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_KEPT_FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def mesh_of(count: int) -> jax.sharding.Mesh | None:
    """That many devices, or None for one. A CPU is divided if nothing was computed yet.

    Raises:
      ValueError: jax has fewer devices, or `count` is not positive.
    """
    require(count >= 1, f"devices must be at least 1, got {count}")
    if count == 1:
        return None
    with contextlib.suppress(RuntimeError):  # jax has begun with as many as it has
        _config.update("jax_num_cpu_devices", count)
    devices = jax.devices()[:count]
    require(len(devices) == count, f"devices must be at most {len(devices)} here, got {count}")
    automatic = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("rows",), axis_types=automatic, devices=devices)


def keep_compiled() -> None:
    """Has jax keep what it compiles in `$XDG_CACHE_HOME/kvjax/jax` and find it there again.

    Jax's own settings come first; a folder that cannot be written is done without.
    """
    if _FOLDER in os.environ or _config.jax_compilation_cache_dir is not None:
        return
    folder = _folder()
    if folder is None:
        return
    _config.update("jax_compilation_cache_dir", str(folder))
    if _KEPT_FROM not in os.environ:
        _config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    said = "Error (reading|writing) persistent compilation cache"
    warnings.filterwarnings("ignore", message=said)  # what is damaged is compiled again


def _folder() -> Path | None:
    said = os.environ.get("XDG_CACHE_HOME", "")
    try:
        above = Path(said) if os.path.isabs(said) else Path.home() / ".cache"
        folder = above / "kvjax" / "jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no such right, no home
        return None
    return folder if os.access(folder, os.R_OK | os.W_OK | os.X_OK) else None
