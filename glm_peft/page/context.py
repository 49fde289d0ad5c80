"""What all tabs of the page share: the engine, where things lie, and how a mistake is told."""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.page.trainings import Trainings
from glm_peft.serving.answerers import BASE
from glm_peft.serving.engine import Engine

_OF_TRAINING = ("adapter_name_or_path", "adapter_revision", "allow_other_base")  # not of the base


@dataclass(frozen=True)
class Context:
    """
    What all tabs share.

    Args:
        engine: answers for the base and the adapters.
        model_args: those of the base.
        adapters: folder or Hub id of each adapter by its name; grows with those that are trained here.
        folder: for what the page writes.
        trainings: the run that was started here last.
    """

    engine: Engine
    model_args: ModelArguments
    adapters: dict[str, str]
    folder: Path
    trainings: Trainings

    @property
    def names(self) -> list[str]:
        """Return who can answer, the base first."""
        return [BASE, *self.adapters]

    @property
    def base_flags(self) -> list[str]:
        """Return the flags by which another command loads the same base."""
        given: dict[str, Any] = {"model_name_or_path": self.model_args.model_name_or_path}
        given |= {name: value for name, value in self.model_args.given.items() if name not in _OF_TRAINING}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@contextmanager
def told() -> Iterator[None]:
    """Show a mistake of the user as a sentence in the page, and leave everything there as it is."""
    try:
        yield
    except UserError as error:
        # Escaped, as the page takes it for HTML, and it may hold a name that somebody chose.
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error


def warn(text: str) -> None:
    """Show in the page what went wrong beside the rest."""
    gr.Warning(html.escape(text))


def note(text: str) -> None:
    """Show in the page that something was done."""
    gr.Info(html.escape(text))
