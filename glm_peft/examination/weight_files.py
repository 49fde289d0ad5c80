"""Check a base's weight files before they are loaded."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from glm_peft.errors import UserError

# The order in which transformers looks for them: the first that is there is the one that it reads.
_IN_ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ADVICE = "download its files again"


def check_weight_files(model_name_or_path: str) -> None:
    """
    Check that the weight files of a folder are all there and complete, as far as their headers tell.

    Raises:
        UserError: there are none, one that the index names is missing, or a safetensors file is cut short or is not
            one, such as the pointer that git leaves without LFS.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():  # a Hub id, whose download checks its files itself
        return
    found = next((name for name in _IN_ORDER if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights, such as {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}: {_ADVICE}.")
    names = _read_index(folder / found) if found.endswith(".json") else [found]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {found} names, such as "
            f"{missing[0]}: {_ADVICE}."
        )
    for name in names:
        _check_header(folder / name)


def _read_index(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no list of weight files: {_ADVICE}.") from error


def _check_header(file: Path) -> None:
    if file.suffix != ".safetensors":
        return
    try:
        # Opening compares the header's offsets with the file's size, and reads no tensor.
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise UserError(f"{file} ({size:,} bytes) is no complete safetensors file ({error}): {_ADVICE}.") from error
