"""The arguments of `python -m glm_peft.serve`: the base, its adapters, where it listens, and what clients may do."""

from dataclasses import dataclass

from glm_peft.arguments.fields import option, require, require_at_least_one
from glm_peft.arguments.generation import GenerationArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import check_sampling, for_prediction, parse_for_answering

SERVE_WORDS = {
    "usage": "python -m glm_peft.serve [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Serves a base and its adapters by the OpenAI API; requests for all of them run in one batch. "
    "Ctrl-C stops it when the requests in progress are answered.",
}
_LARGEST_PORT = 65535


@dataclass
class ServeArguments(GenerationArguments):
    """
    The flags of the server.

    Raises:
        UserError: a number is out of its range, or an argument of sampling is given without `do_sample`.
    """

    _argument_group_name = "server"

    adapters: list[str] | None = option(
        None, "Adapters as name=PATH, a folder or a Hub id each; clients choose one by its name as model, or base."
    )
    host: str = option("127.0.0.1", "Address to listen on; one that other machines can reach needs a key.")
    port: int = option(8000, "Port to listen on; 0 for any that is free.")
    api_key_file: str | None = option(
        None, "File with the key that clients must send. None: the variable GLM_PEFT_API_KEY, or no key."
    )
    allow_adapter_updates: bool = option(
        False, "Let clients load and unload adapters: any folder or Hub id that this process can read."
    )
    max_request_bytes: int = option(4 << 20, "Most bytes of a request.")
    max_waiting: int = option(256, "Most requests that wait for their turn; further ones are told to try again later.")
    drain_seconds: float = option(30.0, "Most seconds to finish requests in progress after SIGTERM or Ctrl-C.")
    cache_tokens: int | None = option(
        None, "Most tokens in the KV cache, prefixes included. None: as many as fit into memory."
    )
    max_batch_tokens: int | None = option(None, "Most tokens that one step computes. None: 512.")
    seed: int | None = option(None, "Seed of sampling for requests without one. None: another one each time.")

    def __post_init__(self) -> None:
        if self.max_new_tokens is None:
            self.max_new_tokens = 512
        numbers = ("max_new_tokens", "max_request_bytes", "max_waiting", "cache_tokens", "max_batch_tokens")
        require_at_least_one(self, *numbers)
        require(0 <= self.port <= _LARGEST_PORT, f"--port must be from 0 to {_LARGEST_PORT}", self.port)
        require(self.drain_seconds >= 0, "--drain_seconds must be 0 or more", self.drain_seconds)
        require(self.num_beams == 1, "--num_beams is not for the server, as beams cannot be streamed", self.num_beams)
        check_sampling(self)


SERVE_TYPES = (for_prediction(ModelArguments), ServeArguments)
"""The dataclasses of `python -m glm_peft.serve`."""


def parse_serve_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, ServeArguments]:
    """
    Parse the arguments of `python -m glm_peft.serve [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    return parse_for_answering(argv, SERVE_TYPES, SERVE_WORDS)
