"""Read the facts of a model card from the folder that a training run, or PEFT, saved an adapter in."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_peft.arguments.methods import FULL, MERGED, METHODS
from glm_peft.distillation.comparison import Comparison
from glm_peft.distillation.report import read_comparison
from glm_peft.errors import UserError
from glm_peft.hub.rights import is_hub_id
from glm_peft.provenance.hardware import RUNTIMES
from glm_peft.provenance.ownership import digest_weights, find_foreign, read_results
from glm_peft.provenance.recipe import public_name
from glm_peft.provenance.record import read_provenance
from glm_peft.provenance.stretches import can_be_repeated, read_stretches
from glm_peft.publishing.card.commands import Commands, write_commands
from glm_peft.publishing.card.examples import number_of_examples, read_compared, read_predictions
from glm_peft.publishing.card.scores import (
    Decoding,
    Scores,
    Split,
    read_decoding,
    read_scores,
    read_split,
    read_splits,
)
from glm_peft.publishing.card.values import is_number, part, text_of
from glm_peft.reporting.file_names import (
    COMPARISON_NAME,
    COMPARISON_PICTURE_NAME,
    CURVES_NAME,
    PROVENANCE_NAME,
)
from glm_peft.reporting.files import read_json
from glm_peft.reporting.results import format_bytes
from glm_peft.training.kept_log import KEPT_TITLES

_FILE, _LINK = re.compile(r"[\w.-]+"), re.compile(r"https?://[^\s()<>]+")
_ORIGINS = ("continued_from", "pruned_from", "converted_from")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """Training without a stop: how it started (`new`, `checkpoint` or `adapter`), its steps, seconds and data."""

    start: str | None
    steps: str | None
    seconds: float | None
    date: str | None
    data: Split


@dataclass(frozen=True)
class Document:
    """A text that was distilled into the prefix: the name of its file, its SHA-256, its length in tokens."""

    name: str | None
    digest: str | None
    tokens: int | None


@dataclass(frozen=True)
class Facts:
    """
    The variables of the card's templates; what is not known is `None` or empty.

    Args:
        method: the value of `--peft_type`.
        method_title: its name in English.
        base: the Hub id of the base, or the name of its folder.
        base_digest: SHA-256 of the base's network settings.
        licence: `license`, `license_name` and `license_link` of the base, as the Hub takes them.
        weights_bytes: size of `adapter_model.safetensors` in bytes.
        weights_digest: SHA-256 of the weights.
        origins: the adapter that this one was made from, by the way it was made.
        splits: the data by split; validation sets with names of their own are `validation_NAME`.
        train_sets: what it was trained on, one after the other; empty where that is not recorded.
        documents: the texts that were distilled into it.
        comparison: with the document, with the prefix, with neither; `None` where none was made.
        compared: the first questions of it with their answers, as many as are shown.
        languages: codes of the rows' languages.
        predictions: the generated answers with prompts, conversations and references.
        examples: the first of them, as many as are shown.
        commands: what the card's code is made of.
        stretches: of training, one after the other.
        can_be_repeated: whether the command of training makes all of them.
        recipe: the recorded settings by the names of their flags.
        protocol: of the scores.
        train_loss: mean over all steps, in nats per token.
        kept: of what the base can do, each measure by its name, at the start of training and now; empty where it was
            not measured.
        hardware: device, times, peak memory and versions, as they are shown.
        lengths: the most tokens of a prompt and of an answer in training.
    """

    method: str
    method_title: str
    is_full: bool
    is_merged: bool
    base: str
    base_is_on_hub: bool
    base_revision: str | None
    base_digest: str | None
    licence: dict[str, str]
    num_virtual_tokens: int | None
    weights_bytes: int
    weights_digest: str | None
    origins: dict[str, str]
    splits: dict[str, Split]
    train_sets: list[Split]
    test: Split
    documents: list[Document]
    comparison: Comparison | None
    has_comparison_picture: bool
    compared: list[dict[str, Any]]
    languages: list[str]
    predictions: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    commands: Commands
    recipe: Mapping[str, Any]
    has_flags: bool
    stretches: list[Stretch]
    can_be_repeated: bool
    scores: list[Scores]
    protocol: str | None
    decoding: Decoding | None
    train_loss: float | None
    kept: dict[str, tuple[float | None, float]]
    has_curves: bool
    hardware: dict[str, str]
    quantization_bit: int | None
    lengths: tuple[int, int] | None
    card_language: str | None


def read_facts(
    folder: str | Path, base_model_id: str | None = None, adapter_id: str | None = None, examples: int | None = None
) -> Facts:
    """
    Read the facts of an adapter, or of a fully fine-tuned model, from its folder.

    Args:
        base_model_id: the base's id on the Hub, where the run had it from a folder.
        adapter_id: the adapter's id on the Hub; `None` for a placeholder in the card's code.
        examples: the most rows of data that the card shows; `None` for what the run was told.

    Raises:
        UserError: there is no adapter and no model in the folder, or `base_model_id` is no id.
    """
    folder = Path(folder)
    if base_model_id is not None and not is_hub_id(base_model_id):
        raise UserError(f"--base_model_id {base_model_id} is no id on the Hub: give it as OWNER/NAME.")
    config = _read_adapter_config(folder)
    record = read_provenance(str(folder)) if (folder / PROVENANCE_NAME).is_file() else {}
    foreign = find_foreign(folder)
    if foreign:
        logger.warning(f"{', '.join(foreign)} in {folder} are not of the weights there: the card leaves them out.")
    # The files win over the record: `predict` may have scored the adapter since it was trained.
    results = part(record, "scores") | read_results(folder, foreign)
    method = (text_of(config.get("peft_type")) or FULL).lower()
    base = base_model_id or _find_base(config, record)
    recipe, splits = part(record, "recipe"), read_splits(part(record, "data") | part(results, "data"))
    predictions = read_predictions(folder, foreign)
    protocol = text_of(results.get("predict_metric_protocol")) or text_of(record.get("metric_protocol"))
    number = number_of_examples(record, examples)
    shown = predictions[:number]
    commands = write_commands(record, base, adapter_id, method == FULL, shown)
    scores = read_scores(results, splits, predictions, protocol)
    lengths = tuple(_number(recipe.get(name)) for name in ("max_source_length", "max_target_length"))
    languages, stretches = record.get("languages"), [_read_stretch(stretch) for stretch in read_stretches(record)]
    return Facts(
        method=method,
        method_title=METHODS[method].title if method in METHODS else method,
        is_full=method == FULL,
        is_merged=method in MERGED,
        base=base,
        base_is_on_hub=is_hub_id(base),
        base_revision=text_of(part(record, "base").get("revision")),
        base_digest=text_of(part(record, "base").get("config_sha256")),
        licence=_read_licence(part(record, "base", "licence"), base),
        num_virtual_tokens=_number(config.get("num_virtual_tokens")),
        weights_digest=digest_weights(folder),
        weights_bytes=sum(file.stat().st_size for file in folder.glob("adapter_model.safetensors")),
        origins={kind: name for kind in _ORIGINS if (name := text_of(part(record, kind).get("name")))},
        splits=splits,
        train_sets=_distinct([stretch.data for stretch in stretches] + [splits.get("train", Split("train"))]),
        test=splits.get("test", Split("test")),
        documents=_read_documents(record.get("documents")),
        comparison=None if COMPARISON_NAME in foreign else read_comparison(folder),
        has_comparison_picture=COMPARISON_PICTURE_NAME not in foreign and (folder / COMPARISON_PICTURE_NAME).is_file(),
        compared=read_compared(folder, foreign)[:number],
        languages=[name for name in map(text_of, languages) if name] if isinstance(languages, list) else [],
        predictions=predictions,
        examples=shown,
        commands=commands,
        recipe=recipe,
        has_flags=bool(part(record, "flags")),
        stretches=stretches,
        can_be_repeated=can_be_repeated(record),
        scores=scores,
        protocol=protocol,
        decoding=read_decoding(record, results, commands.max_new_tokens) if scores else None,
        train_loss=_number(results.get("train_loss")),
        kept={
            name: (_number(results.get(f"start_{name}")), results[f"eval_{name}"])
            for name in KEPT_TITLES
            if is_number(results.get(f"eval_{name}"))
        },
        has_curves=CURVES_NAME not in foreign and (folder / CURVES_NAME).is_file(),
        hardware=_read_hardware(record, results),
        quantization_bit=_number(recipe.get("quantization_bit")),
        lengths=lengths if all(lengths) else None,
        card_language=text_of(record.get("card_language")),
    )


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return PEFT's config; empty for a fully fine-tuned model."""
    config = read_json(folder / "adapter_config.json")
    if not config and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has neither adapter_config.json nor config.json, so there is nothing to write a card of: give "
            "the folder that a training run or PEFT saved an adapter in."
        )
    return config


def _find_base(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    base = part(record, "base")
    recorded, typed = text_of(base.get("hub_id")) or text_of(base.get("name")), config.get("base_model_name_or_path")
    # PEFT writes a path as it was typed; the name of no path would be that of the current folder.
    return recorded or (public_name(typed) if text_of(typed) else "")


def _read_licence(recorded: Mapping[str, Any], base: str) -> dict[str, str]:
    """Return the base's licence as the Hub takes it: in lower case, and with a link that holds outside of the base."""
    found = {name: text.lower() for name in ("license", "license_name") if (text := text_of(recorded.get(name)))}
    if "license" not in found:
        return {}
    if found["license"] == "other":  # for which the Hub asks a name
        found.setdefault("license_name", f"{base.rsplit('/', 1)[-1].lower()}-license")
    link = (text_of(recorded.get("license_link")) or "").removeprefix("./")
    if is_hub_id(base) and _FILE.fullmatch(link):
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    return found | ({"license_link": link} if _LINK.fullmatch(link) else {})


def _read_stretch(stretch: Mapping[str, Any]) -> Stretch:
    steps = stretch.get("steps")
    is_known = isinstance(steps, list) and [is_number(step) for step in steps] == [True, True]
    return Stretch(
        start=text_of(stretch.get("start")),
        steps=f"{steps[0] + 1}–{steps[1]}" if is_known else None,
        seconds=_number(stretch.get("seconds")),
        date=text_of(stretch.get("date")),
        data=read_split("train", part(stretch, "data")),
    )


def _read_documents(recorded: Any) -> list[Document]:
    documents = [each for each in recorded if isinstance(each, dict)] if isinstance(recorded, list) else []
    return [
        Document(text_of(each.get("file")), text_of(each.get("sha256")), _number(each.get("tokens")))
        for each in documents
    ]


def _distinct(splits: list[Split]) -> list[Split]:
    return list({(split.source, split.digest, split.rows): split for split in splits if split.source}.values())


def _read_hardware(record: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    hardware, memory = part(record, "hardware"), part(record, "measured", "peak_memory")
    seconds, versions = part(record, "measured", "seconds"), part(record, "versions")
    names = ("device", "processes", "threads", "dtype", "dtype_of_weights", "dtype_reason")
    rows = {name: hardware[name] for name in names if name in hardware}
    # "NO" is accelerate's name for a single process.
    rows |= {"engine": hardware["engine"]} if hardware.get("engine", "NO") != "NO" else {}
    spent = {task: seconds.get(task, results.get(name)) for name, task in RUNTIMES.items()}
    rows |= {f"seconds_{task}": f"{value:,.1f}" for task, value in spent.items() if is_number(value)}
    rows |= {name: _size(memory[name]) for name in ("gpu_bytes", "resident_bytes") if is_number(memory.get(name))}
    rows |= {"date": record["date"]} if "date" in record else {}
    rows |= {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())} if versions else {}
    return {name: str(value) for name, value in rows.items()}


def _number(value: Any) -> Any:
    return value if is_number(value) else None


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else format_bytes(size)
