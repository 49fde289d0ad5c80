"""Stand-ins for the data tests: arguments with their defaults, a tokenizer and a chat format of one id a character."""

from types import SimpleNamespace
from typing import Any

from glm_peft.errors import UserError
from glm_peft.models.chat_format import EncodedText

END = 1
DEFAULTS = {
    "train_file": None,
    "validation_file": None,
    "test_file": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "prompt_column": None,
    "response_column": None,
    "history_column": None,
    "system_column": None,
    "tools_file": None,
    "source_prefix": None,
    "system_text": None,
    "max_source_length": 1024,
    "max_target_length": 128,
    "val_max_target_length": None,
    "max_train_samples": None,
    "max_eval_samples": None,
    "max_predict_samples": None,
    "preprocessing_num_workers": None,
    "objective": "sft",
    "train_on": "all",
    "skip_bad_rows": False,
    "validation_split": None,
    "stopping_strategy": "first_exhausted",
    "rows_seed": 42,
    "streaming": False,
    "shuffle_buffer_size": 10_000,
    "packing": None,
    "max_length": 512,
}


def make_data_args(**changes: Any) -> SimpleNamespace:
    """Data arguments; only the names that the arguments really have can be changed."""
    unknown = changes.keys() - DEFAULTS
    assert not unknown, unknown
    return SimpleNamespace(**{**DEFAULTS, **changes})


class CharacterTokenizer:
    """Each character is its own code point; ids 0 and 1 pad and end."""

    pad_token_id = 0
    padding_side = "left"

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def num_special_tokens_to_add(self) -> int:
        return 2

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [{0: "<pad>", 1: "<end>"}.get(id_, chr(id_)) for id_ in ids]


class CharacterFormat:
    """`q>a;q>` as the prompt, the answer and the end id after it."""

    def encode_prompt(
        self, tokenizer: CharacterTokenizer, messages: list[dict], max_length: int | None = None
    ) -> EncodedText:
        if "forbidden" in messages[-1]["content"]:
            raise UserError("This format has no such word.")
        ends = {"user": ">", "assistant": ";", "system": "!"}
        text = "".join(message["content"] + ends[message["role"]] for message in messages)
        cut = text if max_length is None else text[-max_length:]
        return EncodedText([ord(character) for character in cut], len(text))

    def arrange(self, messages: list[dict]) -> list[dict]:
        return messages

    def write_turn(self, answer: list[dict]) -> str:
        return "".join(message["content"] for message in answer)

    def encode_answer(
        self, tokenizer: CharacterTokenizer, answer: list[dict], max_length: int | None = None
    ) -> EncodedText:
        answer = self.write_turn(answer)
        cut = answer if max_length is None else answer[: max_length - 1]
        return EncodedText([*(ord(character) for character in cut), END], len(answer) + 1)


def text_of(ids: list[int]) -> str:
    """The ids of `CharacterFormat` as text, with `.` for the end."""
    return "".join("." if id_ == END else chr(id_) for id_ in ids)
