"""Share between the published tokenizers what does not depend on their files: generation, chat prompts, errors."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import BatchEncoding
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.hub import cached_file

from glm_peft.errors import UserError
from glm_peft.models.generations import GENERATIONS, generation_of_name

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
# A clone made without git-lfs holds small text files of this form in the place of large ones.
GIT_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
SURROGATE = re.compile("[\ud800-\udfff]")

Messages = list[dict[str, str]]


def read_json_beside(name_or_path: str, filename: str, **hub_arguments: Any) -> dict[str, Any]:
    """
    Read a JSON file of a local folder or Hub repository as it stands there, or return `{}` where there is none.

    transformers overwrites `name_or_path` while it loads, so what a repository recorded is only in the raw file.
    """
    if Path(name_or_path).is_file():  # a single tokenizer file has nothing beside it
        return {}
    # Private arguments, but the way that transformers itself looks for a file that may be missing.
    file = cached_file(
        name_or_path,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments,
    )
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def recorded_generation(tokenizer_config: dict[str, Any], config: dict[str, Any]) -> str | None:
    """
    Return the generation that a repository's own files record, or `None` where they record none.

    The key `generation` is ours: `save_pretrained` writes it.
    """
    # It comes before the names, which a person may have overruled when it was saved.
    if tokenizer_config.get("generation") in GENERATIONS:
        return tokenizer_config["generation"]
    names = (tokenizer_config.get("name_or_path"), config.get("_name_or_path"))
    return next((generation for generation in map(generation_of_name, names) if generation), None)


def check_tokenizer_file(file: str | None, expected: str, name_or_path: str) -> Path:
    """
    Check that a tokenizer file exists and has content, and return its path.

    Raises:
        UserError: the file is missing, empty, or the pointer that git leaves without git-lfs.
    """
    if file is None or not Path(file).is_file():
        raise UserError(f"The tokenizer file {expected} is not in {name_or_path!r}: download it from the repository.")
    with open(file, "rb") as stream:
        start = stream.read(len(GIT_LFS_HEADER))
    if start == GIT_LFS_HEADER:
        raise UserError(f"{file} is a git-lfs pointer, not the tokenizer file itself: run `git lfs pull` there.")
    if not start:
        raise UserError(f"The tokenizer file {file} is empty: download it again.")
    return Path(file)


def check_texts(texts: list[str]) -> None:
    """Raise a `UserError` for the first text with a lone surrogate, which is half of a character and has no ids."""
    for row, text in enumerate(texts):
        if found := SURROGATE.search(text):
            raise UserError(
                f"Text {row} of the batch holds the lone surrogate U+{ord(found.group()):04X} at character "
                f"{found.start()}, which is not a character: correct the text, or drop it with errors='ignore'."
            )


def check_ids(ids: list[int]) -> None:
    """Raise a `UserError` for a negative id, such as the -100 of labels."""
    # The backends' own errors for it do not say where it comes from.
    if ids and min(ids) < 0:
        raise UserError(
            f"The id {min(ids)} cannot be decoded: replace the -100 of labels by the pad token's id first."
        )


def _refuse(**unsupported: Any) -> None:
    given = next((name for name, value in unsupported.items() if value), None)
    if given is not None:
        raise UserError(f"apply_chat_template has no {given} in the ChatGLM chat formats: leave that argument out.")


class PublishedTokenizerMixin:
    """Mixin that adds generation and chat prompts to a tokenizer of either of transformers' backends."""

    _generation: str | None = None
    possible_generations: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *init_inputs: Any, generation: str | None = None, **kwargs: Any
    ) -> "PublishedTokenizerMixin":
        """
        Load a tokenizer from a folder or Hub id in the published layout, or as `save_pretrained` wrote it.

        Args:
            pretrained_model_name_or_path: the folder or Hub id.
            generation: one of "chatglm", "chatglm2", "chatglm3", "glm4"; wins over what the files record.
            kwargs: as in transformers; `trust_remote_code` and `auto_map` change nothing.

        Raises:
            UserError: where the tokenizer file is missing or broken, or is not of this generation.
        """
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        source = str(pretrained_model_name_or_path)
        tokenizer_config = read_json_beside(source, "tokenizer_config.json", **hub_arguments)
        config = read_json_beside(source, "config.json", **hub_arguments)
        kwargs = {**cls._settings_beside(tokenizer_config, config), **kwargs}
        kwargs["generation"] = generation or cls._recorded_generation(tokenizer_config, config)
        kwargs.pop("trust_remote_code", None)
        return super().from_pretrained(source, *init_inputs, **kwargs)

    @classmethod
    def _recorded_generation(cls, tokenizer_config: dict[str, Any], config: dict[str, Any]) -> str | None:
        generation = recorded_generation(tokenizer_config, config)
        return generation if generation in cls.possible_generations else None

    @classmethod
    def _settings_beside(cls, tokenizer_config: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of `__init__` that older repositories have only in `config.json`."""
        return {}

    @property
    def generation(self) -> str | None:
        """Return "chatglm", "chatglm2", "chatglm3" or "glm4", or `None` where nothing says which it belongs to."""
        return self._generation

    def _check_generation(self, generation: str | None, possible: tuple[str, ...], name_or_path: str) -> str | None:
        """Choose among the generations that a tokenizer file may belong to; a single one needs no record."""
        if generation is not None and generation not in possible:
            raise UserError(
                f"The tokenizer in {name_or_path!r} is of {' or '.join(possible)} by its file, but generation="
                f"{generation!r} was asked for: leave that argument out, or give the folder of that generation."
            )
        return generation or (possible[0] if len(possible) == 1 else None)

    def _check_max_length(
        self,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        special = self.num_special_tokens_to_add() if add_special_tokens else 0
        if (
            truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
            and max_length is not None
            and max_length < special
        ):
            raise UserError(
                f"max_length={max_length} does not hold the {special} special tokens: give a larger value."
            )

    def apply_chat_template(
        self,
        conversation: Messages | list[Messages],
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """
        Encode the chat prompt of this tokenizer's generation, or return it as a text to read.

        It is the prompt of `glm_peft.models.chat_formats`, the same in training, prediction and chat.

        Args:
            conversation: messages with "role" and "content", or a list of such conversations.
            add_generation_prompt: end with what precedes an answer; always so in generations without roles.
            tokenize: give ids; otherwise the text of those ids, which is not meant to be encoded again.
            padding, truncation, max_length, return_tensors, return_dict: as in transformers.

        Raises:
            UserError: where the generation is unknown, or for a feature of templates that the formats do not have.
        """
        # No Jinja template is used: its text is encoded as one, so control tokens in a content would become such.
        _refuse(
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )
        is_batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations = conversation if is_batched else [conversation]
        rows = [self._chat_ids(messages, add_generation_prompt) for messages in conversations]
        if not tokenize:
            texts = [self.decode(row) for row in rows]
            return texts if is_batched else texts[0]
        if truncation and max_length is not None:
            rows = [row[:max_length] if self.truncation_side == "right" else row[-max_length:] for row in rows]
        encoded = self.pad(
            {"input_ids": rows if is_batched or return_tensors else rows[0]},
            padding=padding,
            max_length=max_length,
            return_tensors=return_tensors,
            **{k: v for k, v in (tokenizer_kwargs or {}).items() if k in ("padding_side", "pad_to_multiple_of")},
        )
        return encoded if return_dict else encoded["input_ids"]

    def _chat_ids(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        from glm_peft.models.chat_formats import (
            get_chat_format,  # imports transformers' tokenizers: not at import time
        )

        for message in messages:
            if not isinstance(message.get("content"), str):
                raise UserError(
                    f"The content of a chat message must be a text, but one is {message.get('content')!r}."
                )
        chat_format = get_chat_format(self)
        if add_generation_prompt:
            return chat_format.encode_prompt(self, messages).ids
        if not chat_format.has_roles:
            raise UserError(
                f"The chat format {chat_format.name} has no roles, so its prompt always ends where the answer starts: "
                "pass add_generation_prompt=True."
            )
        # Not asked to go on: an answer stands without its end token, a question without the assistant's role.
        if messages and messages[-1]["role"] == "assistant":
            prompt = chat_format.encode_prompt(self, messages[:-1]).ids
            return prompt + chat_format.encode_answer(self, messages[-1]["content"]).ids[:-1]
        return chat_format.encode_prompt(self, messages).ids[:-1]
