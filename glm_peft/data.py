"""Encode conversations as features, with the same prompt ids in training, evaluation and prediction."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import ChatFormat
from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.preprocessing.conversations import Conversation, Split, paused_collection
from glm_peft.preprocessing.label_weights import weigh_labels
from glm_peft.preprocessing.lengths import LengthReport, summarize_lengths
from glm_peft.preprocessing.messages import Message
from glm_peft.preprocessing.mixing import MixtureReport, mix_sources
from glm_peft.preprocessing.preferences import pair_examples, without_cut_pairs
from glm_peft.preprocessing.streaming import StreamedExamples, stream_conversations

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset

_OF_PROMPTS = {"input_ids": ["int32"], "length": "int32", "prompt_length": "int32"}
_TOKENS_PER_LINE = 8


@dataclass(frozen=True)
class GenerationFeatures:
    """
    Prompts to generate from, with the texts, in the same order, that batches do not carry.

    `dataset` has `input_ids` and `length`; `prompts` are the last questions as the file has them; `references` are
    the answers of the file, `None` where there is none; `decoded_references` are what the published scripts of
    ChatGLM-6B and ChatGLM2-6B compare with: the answers encoded, cut to `val_max_target_length` tokens, and decoded.
    `rows` have the number of the row in the file and its conversation up to the question, without the source prefix.
    """

    dataset: "Dataset"
    prompts: list[str]
    references: list[str | None]
    decoded_references: list[str | None]
    rows: list[dict[str, Any]]
    report: LengthReport


def build_training_features(
    split: Split, chat_format: ChatFormat, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments
) -> tuple["Dataset", LengthReport]:
    """
    Build one example for each answer that is trained on: the prompt exactly as in prediction, then the answer.

    Prompts may have `max_source_length` tokens and answers `max_target_length` (`val_max_target_length` in the
    validation split, where it is given), special tokens included; what is longer is cut by the chat format.

    Returns:
        A dataset of `input_ids`, `labels` (-100 on the prompt) and `length` (tokens), and the report on lengths; with
        `--objective dpo` an example has two of the first two, see `pair_examples`.

    Raises:
        UserError: the chat format refuses a conversation; the message names the row.
    """
    limit = data_args.max_target_length
    if split.kind == "validation":
        limit = data_args.val_max_target_length or limit
    encoder = _Encoder(chat_format, tokenizer, data_args.max_source_length, limit)
    rows = _as_rows(split, data_args, lambda row: row.trained_turns(data_args.train_on, chat_format.arrange))
    is_weighted = len(rows) and "weight" in rows.features["answer"].feature
    features = {**_OF_PROMPTS, "labels": ["int64" if is_weighted else "int32"], "answer_length": "int32"}
    dataset = _encode(rows, encoder, features, data_args, f"{split.name} examples")
    if data_args.objective != DPO:
        return _with_report(dataset, split, data_args, limit)
    dataset = without_cut_pairs(dataset, rows["where"], _flag_of(split), limit, data_args.skip_bad_rows)
    dataset, report = _with_report(dataset, split, data_args, limit)
    return pair_examples(dataset), report


def build_generation_features(
    split: Split, chat_format: ChatFormat, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments
) -> GenerationFeatures:
    """
    Build one prompt for each conversation, without its last answer.

    Raises:
        UserError: the chat format refuses a conversation; the message names the row.
    """
    encoder = _Encoder(chat_format, tokenizer, data_args.max_source_length, None)
    # Apart from the examples for training: generation must not see the answer, and its batches have no labels.
    rows = _as_rows(split, data_args, lambda conversation: [(conversation.prompt, [])])
    dataset, report = _with_report(
        _encode(rows, encoder, _OF_PROMPTS, data_args, f"{split.name} prompts"), split, data_args, None
    )
    prompts = [conversation.prompt[-1]["content"] for conversation in split]
    asked = [with_system(conversation.prompt, data_args.system_text) for conversation in split]
    rows = [{"row": own.number, "messages": messages} for own, messages in zip(split, asked, strict=True)]
    answers = [conversation.answer_messages for conversation in split]
    references = [chat_format.write_turn(answer) if answer else None for answer in answers]
    limit = data_args.val_max_target_length or data_args.max_target_length
    decoded = [_decode_again(tokenizer, answer, limit) for answer in references]
    return GenerationFeatures(dataset, prompts, references, decoded, rows, report)


def join_features(parts: Iterable[GenerationFeatures]) -> GenerationFeatures:
    """Join the prompts of several splits in their order, with the report of the first."""
    from datasets import concatenate_datasets

    parts = list(parts)
    joined = {
        name: list(chain.from_iterable(getattr(part, name) for part in parts))
        for name in ("prompts", "references", "decoded_references", "rows")
    }
    return replace(parts[0], dataset=concatenate_datasets([part.dataset for part in parts]), **joined)


def _decode_again(tokenizer: PreTrainedTokenizerBase, answer: str | None, max_length: int) -> str | None:
    """Return an answer as the published scripts score it: of `max_length` tokens, special ones counted, decoded."""
    if answer is None:
        return None
    # As in encoding with special tokens, which are skipped in decoding, but the tokenizer need not have room for them.
    room = max(max_length - tokenizer.num_special_tokens_to_add(), 0)
    ids = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"][:room]
    return tokenizer.decode(ids, skip_special_tokens=True)


def stream_examples(
    split: Split,
    chat_format: ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    data_args: DataArguments,
    block: int,
) -> StreamedExamples:
    """
    Return the examples of `build_training_features`, made of all rows while training reads them.

    Args:
        split: the first rows of training.
        config: of the base.
        block: examples of a batch, on all devices.
    """
    # Without the first rows, which workers and `datasets` would copy.
    parts = [replace(part, conversations=[]) for part in split.parts or [split]]
    sources = [partial(_stream_turns, part, chat_format, data_args) for part in parts]
    encoder = _Encoder(chat_format, tokenizer, data_args.max_source_length, data_args.max_target_length)
    weights = [part.weight for part in parts]
    return StreamedExamples(sources, weights, encoder.encode_row, data_args, config, block)


def _stream_turns(
    part: Split, chat_format: ChatFormat, data_args: DataArguments, is_first: bool
) -> Iterator[dict[str, Any]]:
    conversations = stream_conversations(part, data_args, is_first)
    return _turns(conversations, data_args, lambda row: row.trained_turns(data_args.train_on, chat_format.arrange))


@dataclass(frozen=True)
class EncodedSplits:
    """
    Splits of a run, encoded as the model takes them.

    Args:
        examples: prompts with answers, for training and for the loss in evaluation; by split, without `test`.
        prompts: prompts alone, of the splits whose answers are generated.
        reports: rows and lengths of every split and source, and how sources are mixed.
    """

    examples: dict[str, "Dataset"]
    prompts: dict[str, GenerationFeatures]
    reports: dict[str, LengthReport | MixtureReport]


def encode_splits(
    splits: Mapping[str, Split],
    chat_format: ChatFormat,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    with_prompts: bool,
) -> EncodedSplits:
    """
    Encode every split for what it is used for.

    Args:
        with_prompts: whether answers are generated in evaluation; in the test split they always are.

    Raises:
        UserError: the chat format refuses a conversation; the message names the row.
    """
    examples, prompts, reports = {}, {}, {}
    for name, split in splits.items():
        if name == "test" or (with_prompts and name != "train"):
            prompts[name] = build_generation_features(split, chat_format, tokenizer, data_args)
            reports[name] = prompts[name].report
        if name != "test":
            encoded = [
                build_training_features(part, chat_format, tokenizer, data_args) for part in split.parts or [split]
            ]
            reports |= {report.split.name: report for _, report in encoded}
            examples[name] = encoded[0][0]
            if split.parts:
                own = [dataset for dataset, _ in encoded]
                examples[name], reports[name] = mix_sources(split.parts, own, data_args)
    return EncodedSplits(examples, prompts, reports)


def describe_example(tokenizer: PreTrainedTokenizerBase, feature: dict[str, Any]) -> str:
    """
    Describe an example for the log: every token with its id, and which of them carry loss.

    Args:
        feature: `input_ids`, and `labels` if it is an example for training.
    """
    ids, labels = feature["input_ids"], feature.get("labels")
    if labels is None:
        tokens = [f"{id_} {text!r}" for text, id_ in zip(_token_texts(tokenizer, ids), ids, strict=True)]
        return "\n".join([f"{len(ids)} tokens", *_token_lines("prompt", tokens)])
    if isinstance(ids[0], list):  # a pair
        both = [{"input_ids": own, "labels": learnt} for own, learnt in zip(ids, labels, strict=True)]
        texts = [describe_example(tokenizer, one) for one in both]
        return "\n".join(f"{name}: {text}" for name, text in zip(("chosen", "rejected"), texts, strict=True))
    lines = [f"{len(ids)} tokens, {sum(label != IGNORED_LABEL for label in labels)} of them carry loss"]
    tokens = zip(_token_texts(tokenizer, ids), ids, labels, strict=True)
    for carries_loss, group in groupby(tokens, lambda token: token[2] != IGNORED_LABEL):
        lines += _token_lines("loss" if carries_loss else "no loss", [f"{id_} {text!r}" for text, id_, _ in group])
    return "\n".join(lines)


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if not getattr(tokenizer, "is_fast", False):
        return tokens
    # Byte-level tokens write each byte as some letter: show the text, unless it is a part of a character only.
    texts = [tokenizer.decode([id_]) for id_ in ids]
    return [token if "\ufffd" in text else text for token, text in zip(tokens, texts, strict=True)]


def _token_lines(name: str, tokens: list[str]) -> Iterator[str]:
    for start in range(0, len(tokens), _TOKENS_PER_LINE):
        yield f"  {name if start == 0 else '':<8}" + " | ".join(tokens[start : start + _TOKENS_PER_LINE])


def _as_rows(
    split: Split,
    data_args: DataArguments,
    turns_of: Callable[[Conversation], list[tuple[list[Message], list[Message]]]],
) -> "Dataset":
    """Put the turns into a dataset."""
    from datasets import Dataset

    # `map` hands its rows to worker processes by file, where Conversation objects would have to be pickled.
    columns: dict[str, list[Any]] = {"messages": [], "answer": [], "where": []}
    with paused_collection():
        for turn in _turns(split, data_args, turns_of):
            for name, value in turn.items():
                columns[name].append(value)
        return Dataset.from_dict(columns)


def _turns(
    conversations: Iterable[Conversation],
    data_args: DataArguments,
    turns_of: Callable[[Conversation], list[tuple[list[Message], list[Message]]]],
) -> Iterator[dict[str, Any]]:
    for conversation in conversations:
        try:
            turns = turns_of(conversation)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error
        for prompt, answer in turns:
            yield {"messages": shape_prompt(prompt, data_args), "answer": answer, "where": conversation.where}


def shape_prompt(messages: list[Message], data_args: DataArguments) -> list[Message]:
    """Return a conversation as the model is asked it: with the system text, and the prefix before the question."""
    return with_source_prefix(with_system(messages, data_args.system_text), data_args.source_prefix)


def with_system(messages: list[Message], system_text: str | None) -> list[Message]:
    """Return a conversation with a system text where it has none."""
    if not system_text or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_text}, *messages]


def with_source_prefix(messages: list[Message], source_prefix: str | None) -> list[Message]:
    """Return a conversation with a text before its last question."""
    if not source_prefix:
        return messages
    # The last message may be what a tool said to the question.
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    question = messages[place]
    asked = {**question, "content": source_prefix + question["content"]}
    return [*messages[:place], asked, *messages[place + 1 :]]


@dataclass
class _Encoder:
    """Encoder of batches of rows; `max_answer_length` is `None` where there are no answers."""

    chat_format: Any
    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    max_answer_length: int | None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = zip(batch["messages"], batch["answer"], batch["where"], strict=True)
        encoded = [self.encode_row(*row) for row in rows]
        return {name: [row[name] for row in encoded] for name in encoded[0]}

    def encode_row(self, messages: list[Message], answer: list[Message], where: str) -> dict[str, Any]:
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


def _encode(
    rows: "Dataset", encoder: _Encoder, features: dict[str, Any], data_args: DataArguments, name: str
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


def _flag_of(split: Split) -> str:
    return "--val_max_target_length" if split.kind != "train" else "--max_target_length"


def _with_report(
    dataset: "Dataset", split: Split, data_args: DataArguments, max_answer_length: int | None
) -> tuple["Dataset", LengthReport]:
    per_row = 2 if data_args.objective == DPO and max_answer_length is not None else 1
    prompt_lengths = dataset["prompt_length"][::per_row]
    lengths = [summarize_lengths("prompt", "--max_source_length", data_args.max_source_length, prompt_lengths)]
    measured = ["prompt_length"]
    if max_answer_length is not None:
        lengths.append(summarize_lengths("answer", _flag_of(split), max_answer_length, dataset["answer_length"][:]))
        measured.append("answer_length")
    # Columns that served the report only.
    return dataset.remove_columns(measured), LengthReport(split, len(prompt_lengths), tuple(lengths))
