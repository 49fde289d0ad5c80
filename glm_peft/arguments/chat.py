"""The arguments of `python -m glm_peft.chat`: the base, its adapters, and how answers are generated."""

from dataclasses import dataclass

from glm_peft.arguments.fields import option, require, require_at_least_one
from glm_peft.arguments.generation import GenerationArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import check_sampling, for_prediction, parse_for_answering

CHAT_WORDS = {
    "usage": "python -m glm_peft.chat [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Chat with a base and its adapters in the terminal; /help there lists the commands. From a pipe "
    "each line is a question, and only the answers are printed.",
}


@dataclass
class ChatArguments(GenerationArguments):
    """
    The flags of chat.

    Raises:
        UserError: a number is out of its range, or an argument of sampling is given without `do_sample`.
    """

    _argument_group_name = "chat"

    adapters: list[str] | None = option(
        None, "Adapters as name=PATH, a folder or a Hub id each; /adapter NAME changes to one."
    )
    system: str | None = option(None, "System text, which comes before all turns. None: none.")
    seed: int = option(42, "Seed of --do_sample.")

    def __post_init__(self) -> None:
        if self.max_new_tokens is None:
            self.max_new_tokens = 512
        require_at_least_one(self, "max_new_tokens")
        require(self.num_beams == 1, "--num_beams is not for chat, as beams cannot be streamed", self.num_beams)
        check_sampling(self)


CHAT_TYPES = (for_prediction(ModelArguments), ChatArguments)
"""The dataclasses of `python -m glm_peft.chat`."""


def parse_chat_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, ChatArguments]:
    """
    Parse the arguments of `python -m glm_peft.chat [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    return parse_for_answering(argv, CHAT_TYPES, CHAT_WORDS)
