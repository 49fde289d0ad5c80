"""
Write and read `provenance.json`, the record of a training run beside its adapter, which PEFT does not touch.

It holds names of files and folders, never their paths, and no names of users or machines.
"""

import datetime
import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import PartialState
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.sources import Source, read_train_sources
from glm_peft.arguments.splits import file_of
from glm_peft.models.chat_formats import ChatFormat
from glm_peft.models.layerwise_casting import kept_dtype
from glm_peft.models.loading import choose_dtype, find_generation, hub_arguments
from glm_peft.models.tokenization_common import read_json_beside
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.conversations import Conversation, Split
from glm_peft.provenance.fingerprints import (
    describe_config,
    digest_config,
    digest_rows,
    digest_tokenizer,
    sample_weights,
)
from glm_peft.provenance.hardware import describe_hardware, measure_cost
from glm_peft.provenance.ownership import CURVES_KEY, WEIGHTS, WEIGHTS_KEY, digest_weights

if TYPE_CHECKING:  # of training alone
    from glm_peft.arguments.training import TrainArguments
from glm_peft.provenance.recipe import describe_flags, describe_recipe, public_name, select_scores
from glm_peft.reporting.file_names import CURVES_NAME, PROVENANCE_NAME
from glm_peft.reporting.files import digest_file, write_atomically

logger = logging.getLogger(__name__)

_PACKAGES = ("glm_peft", "torch", "transformers", "peft", "accelerate", "tokenizers", "sentencepiece", "bitsandbytes")
_LICENCE = ("license", "license_name", "license_link")
_HAN, _KANA = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile(r"[\u3040-\u30ff]")
_SAMPLED_ROWS = 2000
_COMMIT = re.compile(r"[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")


def describe_origin(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    protocol: str,
    splits: Mapping[str, Split],
    data: Mapping[str, Any],
    arguments: "TrainArguments",
) -> dict[str, Any]:
    """
    Describe a training run before its first step; in processes other than the main one the record is empty.

    Args:
        protocol: the name of the score protocol.
        splits: the conversations by split.
        data: what `describe_data` returned of them.
        arguments: the resolved arguments.
    """
    if not PartialState().is_main_process:
        return {}
    model_args, data_args, training_args = arguments
    dtype, reason = choose_dtype(model_args.dtype, training_args.device, base_of(model).dtype)
    kept = kept_dtype(model)
    precision = {"dtype": str(dtype).removeprefix("torch.")}
    precision |= {"dtype_of_weights": str(kept).removeprefix("torch.")} if kept else {}
    precision |= {"dtype_reason": reason}
    record = {
        "base": describe_base(base_of(model).config, find_generation(model_args), tokenizer, model),
        "chat_format": chat_format.name,
        "prompt": describe_prompt(data_args, splits.get("train", ())),
        "metric_protocol": protocol,
        "recipe": describe_recipe(arguments),
        "flags": describe_flags(*arguments),
        "data": data,
        "languages": find_languages(splits),
        "hardware": describe_hardware(training_args) | precision,
        "card_language": training_args.card_language,
        "card_examples": training_args.card_examples,
    }
    # Left out where they are unknown, which is not the same as none.
    licence, hub_id = read_licence(model_args), training_args.base_model_id
    record["base"] |= ({"licence": licence} if licence else {}) | ({"hub_id": hub_id} if hub_id else {})
    if model_args.adapter_name_or_path:
        record["continued_from"] = describe_weights(model_args.adapter_name_or_path)
    return record


def describe_base(
    config: PreTrainedConfig,
    generation: str | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | PeftModel | None = None,
) -> dict[str, Any]:
    """Return name, revision and fingerprints of a base; those of its tokenizer and weights where they are given."""
    # A base in the Hub's cache tells its commit by its path, one that was loaded by its id by transformers' attribute.
    found = _COMMIT.search(str(config.name_or_path))
    fields = describe_config(config)
    base = {
        "name": public_name(config.name_or_path),
        "revision": found["commit"] if found else getattr(config, "_commit_hash", None),
        "generation": generation,
        "config_sha256": digest_config(fields),
        "config": fields,
    }
    if tokenizer is not None:
        base["tokenizer_sha256"] = digest_tokenizer(tokenizer)
    if model is not None:
        base["weights_sample"] = sample_weights(model)
    return base


def describe_prompt(data_args: DataArguments, conversations: Iterable[Conversation] = ()) -> dict[str, Any]:
    """
    Return what shapes the prompts beside the chat format, by flag.

    Args:
        data_args: the resolved arguments.
        conversations: the rows of training; a system text that all of them have is told as that of `--system_text`.
    """
    prompt = {name: getattr(data_args, name) for name in flags_with(data_args, "shapes_prompt")}
    texts = {conversation.system for conversation in conversations}
    return prompt | ({"system_text": texts.pop()} if len(texts) == 1 and None not in texts else {})


def as_flags(values: Mapping[str, Any]) -> str:
    """Return flags as they are told in one line, long texts cut."""
    told = ((f"--{name}", value) for name, value in values.items())
    return ", ".join(f"no {flag}" if value is None else f"{flag} {value!r:.80}" for flag, value in told)


def describe_data(data_args: DataArguments, splits: Mapping[str, Split]) -> dict[str, dict[str, Any]]:
    """
    Return for each split the name and digest of its file or dataset, and how many rows are used, of a stream none.

    Of training the rows have a digest, too, by which they are known again in another form or with other columns. In
    processes other than the main one nothing is returned.
    """
    described: dict[str, dict[str, Any]] = {}
    if not PartialState().is_main_process:
        return described  # every file of data is read: once is enough
    for name, split in splits.items():
        is_held_out = split.kind == "validation" and data_args.validation_split is not None
        file = file_of(data_args, name)
        sources = read_train_sources(file) if name == "train" else []
        if sources:
            source = {"file": ", ".join(Path(each.file).name for each in sources)}
        elif file:
            source = {"file": Path(file).name, "sha256": digest_file(file)}
        else:
            source = {"dataset": public_name(data_args.dataset_name), "config": data_args.dataset_config_name}
        is_streamed = name == "train" and data_args.streaming
        mixture = [_describe_source(*pair, not is_streamed) for pair in zip(sources, split.parts, strict=False)]
        if mixture:
            source |= {"sources": mixture, "stopping_strategy": data_args.stopping_strategy}
        if not file or name == "train" or is_held_out:  # a dataset on the Hub may change under its name
            # With other weights or another order a run would go on with other examples.
            order = [[each["weight"] for each in mixture], data_args.stopping_strategy, data_args.rows_seed]
            if is_streamed:  # of which the split has the first rows alone, so the files stand for the others
                order += [data_args.shuffle_buffer_size, data_args.max_train_samples]
                order += [each["sha256"] for each in mixture or [source] if "sha256" in each]
            digested = [*map(_as_digested, split), *([order] if mixture or is_streamed else [])]
            source |= {"rows_sha256": digest_rows(digested)}
        if mixture or is_held_out or is_streamed:
            source |= {"seed": data_args.rows_seed}
        if is_held_out:
            source |= {"held_out": data_args.validation_split}
        count = {"shuffle_buffer_size": data_args.shuffle_buffer_size} if is_streamed else {"rows": len(split)}
        described[name] = source | count
    return described


def _describe_source(source: Source, part: Split, is_whole: bool) -> dict[str, Any]:
    file = {"file": Path(source.file).name, "sha256": digest_file(source.file)}
    return {"name": source.name, **file, "weight": source.weight} | ({"rows": len(part)} if is_whole else {})


def _as_digested(conversation: Conversation) -> list[Any]:
    # What carries no loss is told only where there is some, as the digests of earlier versions know of none.
    muted = [sorted(conversation.muted)] if conversation.muted else []
    return [*conversation.messages, *conversation.rejected, *muted]


def read_licence(model_args: ModelArguments) -> dict[str, str]:
    """
    Return `license`, `license_name` and `license_link` as the base's own card states them.

    Args:
        model_args: `model_name_or_path`, and maybe `model_revision` and `cache_dir`.

    Returns:
        The texts by their names; empty where the card names no licence, is missing, or cannot be reached.
    """
    options = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    options = {f"_raise_exceptions_for_{name}": value for name, value in options.items()}
    try:
        file = cached_file(model_args.model_name_or_path, "README.md", **options, **hub_arguments(model_args))
        card = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict() if file else {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a licence is not worth a run
        return {}
    found = {name: card[name] for name in _LICENCE if isinstance(card.get(name), str)}
    return found if "license" in found else {}


def find_languages(splits: Mapping[str, Split]) -> list[str]:
    """Return `zh` where a fifth of the characters of the training's rows is Chinese; other languages are not told."""
    rows = islice(splits.get("train", next(iter(splits.values()), [])), _SAMPLED_ROWS)
    text = "".join(message["content"] for conversation in rows for message in conversation.messages)
    han, kana = len(_HAN.findall(text)), len(_KANA.findall(text))
    return ["zh"] if text and han >= len(text) / 5 and kana < han / 20 else []  # Japanese has kana in between


def describe_weights(folder_or_id: str) -> dict[str, Any]:
    """Return the name of an adapter or checkpoint, and the digests of its weight files where it is a folder."""
    files = sorted({file for name in WEIGHTS for file in Path(folder_or_id).glob(name) if file.is_file()})
    return {"name": public_name(folder_or_id), "sha256": {file.name: digest_file(file) for file in files}}


def write_provenance(folder: str | Path, record: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> None:
    """Write `provenance.json`: a record, whose weights and curves it is of, scores, cost, versions and the date."""
    if not PartialState().is_main_process:
        return
    results, curves = results or {}, Path(folder) / CURVES_NAME
    measured, seconds = measure_cost(results), [stretch.get("seconds") for stretch in record.get("stretches", [])]
    if seconds:  # those of all stretches, not of the last one alone
        total = None if None in seconds else round(sum(seconds), 4)
        measured["seconds"] = {**measured.get("seconds", {}), "train": total}
    whole = {**record, "scores": select_scores(results), "measured": measured}
    whole.setdefault(WEIGHTS_KEY, digest_weights(folder))
    whole[CURVES_KEY] = digest_file(curves) if curves.is_file() else None
    whole |= {"versions": _describe_versions(), "date": today()}
    text = json.dumps(whole, indent=2, ensure_ascii=False, default=str)  # flags may hold enums and dtypes
    write_atomically(Path(folder) / PROVENANCE_NAME, text + "\n")


def read_provenance(adapter_name_or_path: str) -> dict[str, Any]:
    """Read the record of an adapter in a folder or on the Hub; empty where there is none or it cannot be read."""
    try:
        record = read_json_beside(adapter_name_or_path, PROVENANCE_NAME)
    except (OSError, ValueError) as error:
        logger.warning(
            "%s in %s cannot be read (%s), so nothing is known of the base that the adapter was trained on.",
            PROVENANCE_NAME,
            adapter_name_or_path,
            type(error).__name__,
        )
        return {}
    record = record if isinstance(record, dict) else {}
    own = digest_weights(adapter_name_or_path) if WEIGHTS_KEY in record else None
    if own not in (None, record.get(WEIGHTS_KEY)):
        logger.warning("%s in %s is of other weights: it is left out.", PROVENANCE_NAME, adapter_name_or_path)
        return {}
    return record


def today() -> str:
    """Return the date in UTC: the same day wherever the machine stands."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _describe_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # bitsandbytes is optional, and the package itself may run from its folder
    return versions


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a value of a record that should be a mapping, or an empty one where it is something else."""
    # A record is a file that anyone may have edited, and none of it is needed to load an adapter.
    return value if isinstance(value, dict) else {}
