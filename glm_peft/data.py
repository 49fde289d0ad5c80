"""Encode conversations as features, with the same prompt ids in training, evaluation and prediction."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.models.chat_formats import ChatFormat
from glm_peft.preprocessing.conversations import Split
from glm_peft.preprocessing.encoding import Encoder, as_rows, encode_rows, list_turns
from glm_peft.preprocessing.lengths import LengthReport, summarize_lengths
from glm_peft.preprocessing.mixing import MixtureReport, mix_sources
from glm_peft.preprocessing.preferences import pair_examples, without_cut_pairs
from glm_peft.preprocessing.prompt_shape import with_system
from glm_peft.preprocessing.streaming import StreamedExamples, stream_conversations

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset

_OF_PROMPTS = {"input_ids": ["int32"], "length": "int32", "prompt_length": "int32"}


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
    encoder = Encoder(chat_format, tokenizer, data_args.max_source_length, limit)
    rows = as_rows(split, data_args, lambda row: row.trained_turns(data_args.train_on, chat_format.arrange))
    is_weighted = len(rows) and "weight" in rows.features["answer"].feature
    features = {**_OF_PROMPTS, "labels": ["int64" if is_weighted else "int32"], "answer_length": "int32"}
    dataset = encode_rows(rows, encoder, features, data_args, f"{split.name} examples")
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
    encoder = Encoder(chat_format, tokenizer, data_args.max_source_length, None)
    # Apart from the examples for training: generation must not see the answer, and its batches have no labels.
    rows = as_rows(split, data_args, lambda conversation: [(conversation.prompt, [])])
    dataset, report = _with_report(
        encode_rows(rows, encoder, _OF_PROMPTS, data_args, f"{split.name} prompts"), split, data_args, None
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
    encoder = Encoder(chat_format, tokenizer, data_args.max_source_length, data_args.max_target_length)
    weights = [part.weight for part in parts]
    return StreamedExamples(sources, weights, encoder.encode_row, data_args, config, block)


def _stream_turns(
    part: Split, chat_format: ChatFormat, data_args: DataArguments, is_first: bool
) -> Iterator[dict[str, Any]]:
    conversations = stream_conversations(part, data_args, is_first)
    return list_turns(conversations, data_args, lambda row: row.trained_turns(data_args.train_on, chat_format.arrange))


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
