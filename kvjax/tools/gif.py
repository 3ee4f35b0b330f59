"""An animation of rendered frames. Needs the extra `kvjax[gif]` (pillow, pygame)."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.base import files

DEFAULT_FPS = 30

_MAX_WIDTH = 300  # pixels; wider frames are thinned

_QUIET_PYGAME = {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy"}
"""Pygame greets on standard output, and looks for a screen that nothing here needs."""


class Frames:
    """Frames on their way to a GIF file.

    Raises:
      ValueError: the path cannot be a GIF's, or what draws it is not installed; said before the
        first frame, so that no episode is played in vain.
      OSError: the file cannot be written; likewise.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._frames: list[np.ndarray[Any, Any]] = []
        if self._path.suffix.lower() != ".gif":
            raise ValueError(f"an animation's name must end in .gif, got {path}")
        if not self._path.parent.is_dir():
            raise ValueError(f"no such folder for the animation: {self._path.parent}")
        missing = [name for name in ("PIL", "pygame") if not importlib.util.find_spec(name)]
        if missing:
            raise ValueError(f"drawing needs {', '.join(missing)}: pip install 'kvjax[gif]'")
        files.require_writable(self._path)
        for name, value in _QUIET_PYGAME.items():
            os.environ.setdefault(name, value)

    def append(self, frame: Any) -> None:
        """Adds an image [height, width, 3] uint8.

        Raises:
          ValueError: the environment rendered something else.
        """
        image = np.asarray(frame)
        if image.ndim != 3:
            raise ValueError(f"the environment renders {image.shape}, expected [height, width, 3]")
        step = -(-image.shape[1] // _MAX_WIDTH)
        self._frames.append(image[::step, ::step])

    def write(self, fps: float) -> None:
        """Writes the file, `fps` frames a second, looping for ever.

        Raises:
          OSError: the file cannot be written; what was there before is left.
        """
        from PIL import Image

        first, *others = [Image.fromarray(frame) for frame in self._frames]
        duration = round(1000 / fps)
        options = {"save_all": True, "append_images": others, "duration": duration, "loop": 0}
        with files.replacing(self._path) as file:
            first.save(file, format="GIF", **options)
