"""Tell by a digest which results in a folder are of the weights there, and keep those of others apart."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.reporting.file_names import (
    CARD_NAME,
    COMPARISON_ANSWERS_NAME,
    COMPARISON_NAME,
    COMPARISON_PICTURE_NAME,
    CURVES_NAME,
    PREDICT_RESULTS_NAME,
    PREDICTIONS_NAME,
    PROVENANCE_NAME,
    RESULTS_NAME,
)
from glm_peft.reporting.files import digest_file, read_json

logger = logging.getLogger(__name__)

WEIGHTS_KEY, CURVES_KEY = "weights_sha256", "curves_sha256"
WEIGHTS = ("adapter_model.*", "pytorch_model*", "model*.safetensors")
"""The names of weights: PEFT's, which count first, those of a published prefix, and those of a whole model."""

_RESULTS = (RESULTS_NAME, PREDICT_RESULTS_NAME)
_OF_WEIGHTS = (
    *(PROVENANCE_NAME, CARD_NAME, *_RESULTS, PREDICTIONS_NAME),
    *(COMPARISON_NAME, COMPARISON_PICTURE_NAME, COMPARISON_ANSWERS_NAME),
)


def digest_weights(folder: str | Path) -> str | None:
    """
    Return the SHA-256 of the weights in a folder; `None` where there are none.

    It is that of their file, by which the Hub knows it, too, and of several files that of their digests.
    """
    for pattern in WEIGHTS:
        digests = [digest_file(file) for file in sorted(Path(folder).glob(pattern)) if file.is_file()]
        if digests:
            return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return None


def find_foreign(folder: str | Path) -> list[str]:
    """Return the names of the record, results, predictions and pictures in a folder that are of other weights."""
    folder, own = Path(folder), digest_weights(folder)
    record = read_json(folder / PROVENANCE_NAME)
    recorded = record.get(WEIGHTS_KEY, own)
    # Of what an earlier version left nobody knows: it counts, unless a record says that a later one wrote here.
    unstated = None if WEIGHTS_KEY in record else own
    stated = {name: read_json(folder / name).get(WEIGHTS_KEY, unstated) for name in (*_RESULTS, COMPARISON_NAME)}
    # Written together with their results, which say whose they are.
    stated |= {PROVENANCE_NAME: recorded, PREDICTIONS_NAME: stated[PREDICT_RESULTS_NAME], CURVES_NAME: recorded}
    stated[COMPARISON_PICTURE_NAME] = stated[COMPARISON_NAME]
    foreign = [name for name in stated if (folder / name).is_file() and stated[name] != own]
    # The picture is drawn before the weights are written, so the record says which one is theirs.
    if CURVES_KEY in record and CURVES_NAME not in foreign and (folder / CURVES_NAME).is_file():
        foreign += [CURVES_NAME] if digest_file(folder / CURVES_NAME) != record[CURVES_KEY] else []
    return foreign


def state_origin(weights: str | None, data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """
    Return what results say of themselves: the digest of the weights, and the data that they were computed on.

    Args:
        data: what `describe_data` returned.
        kind: of the splits, `validation` or `test`.
    """
    return {WEIGHTS_KEY: weights, "data": {name: data[name] for name in data if name.startswith(kind)}}


def read_results(folder: str | Path, foreign: Sequence[str]) -> dict[str, Any]:
    """Return the results in a folder but the foreign ones, and under `data` what they were computed on."""
    found, data = {}, {}
    for name in (name for name in _RESULTS if name not in foreign):  # those of a later prediction win
        found |= read_json(Path(folder) / name)
        data |= found["data"] if isinstance(found.get("data"), dict) else {}
    return found | {"data": data}


def claim_folder(output_dir: str | Path, model_args: ModelArguments) -> str | None:
    """
    Return the digest of the weights that answer, and refuse a folder of other weights for their results.

    Raises:
        UserError: the folder has the weights of another adapter or model.
    """
    own, adapter, base = digest_weights(output_dir), model_args.adapter_name_or_path, model_args.model_name_or_path
    # Without an adapter a base answers, whose weights take minutes to read, unless its own folder is written to.
    source = adapter or (base if Path(base).resolve() == Path(output_dir).resolve() else None)
    answering = digest_weights(source) if source else None
    if own not in (None, answering):
        raise UserError(
            f"--output_dir {output_dir} has other weights than those that answer here ({adapter or base}), and the "
            f"results would be taken for theirs: give another --output_dir, or --adapter_name_or_path {output_dir}."
        )
    return answering


def refuse_adapter(output_dir: str | Path) -> None:
    """Raise a `UserError` where a whole model is to be written into the folder of an adapter."""
    if (Path(output_dir) / "adapter_config.json").is_file():
        raise UserError(
            f"--output_dir {output_dir} has an adapter, and a whole model beside it would be taken for that: give "
            "another --output_dir."
        )


def set_aside_results(folder: str | Path, former: str | None, curves: str | None = CURVES_NAME) -> str | None:
    """
    Move the results of former weights into a folder of their own, once others were written in their place.

    Args:
        former: the digest of the weights that were there before.
        curves: the file of curves; `None` where it is of the new weights.

    Returns:
        The digest of the weights that are there now.
    """
    folder, own = Path(folder), digest_weights(folder)
    names = [name for name in (*_OF_WEIGHTS, curves) if name and (folder / name).is_file()]
    if own == former or not names:
        return own
    aside = folder / f"former_{(former or 'results')[:8]}"
    aside.mkdir(exist_ok=True)
    for name in names:
        (folder / name).replace(aside / name)
    logger.warning("%s has other weights now: %s of those before went to %s.", folder, ", ".join(names), aside)
    return own
