"""Parse the arguments of `python -m glm_peft.push`: the adapter, the repository, and the card's language."""

from dataclasses import dataclass, field
from typing import Literal

from glm_peft.arguments.command_line import parse_command
from glm_peft.arguments.fields import option, require
from glm_peft.arguments.settings import split_words
from glm_peft.errors import UserError

PUSH_WORDS = {
    "usage": "python -m glm_peft.push ADAPTER --repo_id USER/NAME [--flags]",
    "description": "Sends an adapter to the Hub with its card, curves and results, and nothing else.",
}


@dataclass
class PushArguments:
    """The repository that an adapter is sent to, and the words of its commit and card."""

    _argument_group_name = "push"

    repo_id: str | None = option(
        None, "Repository on the Hub, such as USER/NAME; it is created if it does not exist.", "hub_model_id"
    )
    base_model_id: str | None = option(
        None, "Hub id of the base, which the adapter names on the Hub. None: the one that the adapter names."
    )
    revision: str | None = option(
        None, "Branch to send to; it is created if it does not exist. None: main.", "hub_revision"
    )
    tags: list[str] = field(default_factory=list, metadata={"help": "Names for the commit, such as v1.0."})
    private: bool | None = option(
        None, "Make a new repository private. None: as the user's settings on the Hub say.", "hub_private_repo"
    )
    commit_message: str | None = option(None, "Title of the commit. None: the base and the scores of the adapter.")
    card_language: Literal["en", "zh"] | None = option(None, "Language of the model card. None: as in the training.")
    card_examples: int | None = option(
        None, "Rows of data that the model card shows with their answers; 0 for none. None: as in the training, or 3."
    )
    dry_run: bool = option(False, "Send nothing: list the files with their sizes, and show the card.")


def parse_push_arguments(argv: list[str] | None = None) -> tuple[str, PushArguments]:
    """
    Parse `python -m glm_peft.push ADAPTER [--flags]` into the adapter's folder and the arguments.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    adapters, flags = split_words(argv)  # the shared parser knows flags and configuration files alone
    (arguments,) = parse_command(flags, (PushArguments,), **PUSH_WORDS)
    examples = arguments.card_examples
    require(examples is None or examples >= 0, "--card_examples must be 0 or more", examples)
    if len(adapters) != 1:
        raise UserError(f"One adapter stands before the flags, found {len(adapters)}: name the folder ADAPTER.")
    if not (arguments.repo_id or arguments.dry_run):
        raise UserError("--repo_id is not given: name a repository on the Hub, such as USER/NAME.")
    return adapters[0], arguments
