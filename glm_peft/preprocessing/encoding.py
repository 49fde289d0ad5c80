"""Encode the turns of conversations as ids, each within its limits."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from glm_peft.arguments.data import DataArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.preprocessing.conversations import Conversation, Split, paused_collection
from glm_peft.preprocessing.label_weights import weigh_labels
from glm_peft.preprocessing.messages import Message
from glm_peft.preprocessing.prompt_shape import shape_prompt

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset


def as_rows(
    split: Split,
    data_args: DataArguments,
    turns_of: Callable[[Conversation], list[tuple[list[Message], list[Message]]]],
) -> "Dataset":
    """Put prompts and answers, which `turns_of` takes from each conversation, into a dataset with where they stand."""
    from datasets import Dataset

    # `map` hands its rows to worker processes by file, where Conversation objects would have to be pickled.
    columns: dict[str, list[Any]] = {"messages": [], "answer": [], "where": []}
    with paused_collection():
        for turn in list_turns(split, data_args, turns_of):
            for name, value in turn.items():
                columns[name].append(value)
        return Dataset.from_dict(columns)


def list_turns(
    conversations: Iterable[Conversation],
    data_args: DataArguments,
    turns_of: Callable[[Conversation], list[tuple[list[Message], list[Message]]]],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `as_rows` one by one; a `UserError` about one names it."""
    for conversation in conversations:
        try:
            turns = turns_of(conversation)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error
        for prompt, answer in turns:
            yield {"messages": shape_prompt(prompt, data_args), "answer": answer, "where": conversation.where}


@dataclass
class Encoder:
    """
    Encode batches of rows, or single ones.

    Args:
        max_prompt_length: the most tokens of a prompt, which the chat format cuts.
        max_answer_length: of an answer; `None` where there are none.
    """

    chat_format: Any
    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    max_answer_length: int | None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = zip(batch["messages"], batch["answer"], batch["where"], strict=True)
        encoded = [self.encode_row(*row) for row in rows]
        return {name: [row[name] for row in encoded] for name in encoded[0]}

    def encode_row(self, messages: list[Message], answer: list[Message], where: str) -> dict[str, Any]:
        """
        Return the ids of a prompt, with those of its answer as labels where there is one, and their whole lengths.

        Raises:
            UserError: the chat format refuses the messages; `where` says which row they are of.
        """
        try:
            prompt, prompt_length = self._fit(self.chat_format.encode_prompt, messages, self.max_prompt_length)
            if self.max_answer_length is None:
                return {"input_ids": prompt, "length": len(prompt), "prompt_length": prompt_length}
            ids, answer_length = self._fit(self.chat_format.encode_answer, answer, self.max_answer_length)
        except UserError as error:  # the chat format knows the messages, but not the row that they came from
            raise UserError(f"{where}: {error}") from error
        return {
            "input_ids": prompt + ids,
            # The messages of a turn have one weight.
            "labels": [IGNORED_LABEL] * len(prompt) + weigh_labels(ids, float(answer[0].get("weight") or 1)),
            "length": len(prompt) + len(ids),
            "prompt_length": prompt_length,
            "answer_length": answer_length,
        }

    def _fit(self, encode: Callable[..., Any], content: Any, limit: int) -> tuple[list[int], int]:
        """Return the ids within the limit, and how many they would be without one."""
        encoded = encode(self.tokenizer, content, max_length=limit)
        return encoded.ids, encoded.whole_length


def encode_rows(
    rows: "Dataset", encoder: Encoder, features: dict[str, Any], data_args: DataArguments, name: str
) -> "Dataset":
    """Encode the turns; of each column the type of its numbers is given, in a list where it holds several."""
    from datasets import Features, List, Value
    from datasets.fingerprint import generate_random_fingerprint

    types = {name: List(Value(*each)) if isinstance(each, list) else Value(each) for name, each in features.items()}
    # Encoded anew in memory by each run, so nothing is looked up by the fingerprint; that of `datasets` would hash the
    # tokenizer, which takes time and is not stable.
    with paused_collection():
        return rows.map(
            encoder,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=rows.column_names,
            features=Features(types),
            keep_in_memory=True,
            new_fingerprint=generate_random_fingerprint(),
            desc=f"Encoding {name}",
        )
