"""What many short runs in one process need not do each time anew; no test itself."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import jinja2


def take_shortcuts() -> None:
    """
    Compile each template of a card once, and lay out curves but write a file in the place of the picture.

    Pixels take longer than all else of a short run. They are drawn in tests/test_curves.py, which has the function by
    its name, and wherever a test types a command.
    """
    jinja2.Template = functools.cache(jinja2.Template)
    if curves := sys.modules.get("glm_peft.training.curves"):
        curves.plot_training_curves = _without_pixels(curves.plot_training_curves)


def _without_pixels(draw: Callable[..., Path | None]) -> Callable[..., Path | None]:
    def draw_without_pixels(*args: object) -> Path | None:
        from matplotlib.figure import Figure

        with patch.object(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"a picture")):
            return draw(*args)

    return draw_without_pixels
