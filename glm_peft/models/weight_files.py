"""Look at the weight files of a folder by their heads: which tensor is where, and whether each file is whole."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from glm_peft.errors import UserError
from glm_peft.models.tokenization_common import GIT_LFS_HEADER

# The order in which transformers looks for them: the first that is there is the one that it reads.
_IN_ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ZIP, _PICKLE = b"PK", b"\x80"  # how torch.save begins a file, since torch 1.6 and before


def find_weights(folder: Path) -> Path | None:
    """Return the file of weights in a folder, or the index of several, or `None` where there is neither."""
    return next((folder / name for name in _IN_ORDER if (folder / name).is_file()), None)


def check_weight_files(folder: Path) -> None:
    """
    Check that the weight files of a model are all there and whole, as far as their heads tell.

    Raises:
        UserError: there are none, one that the index names is missing, or one cannot be read.
    """
    found = find_weights(folder)
    if found is None:
        raise UserError(
            f"{folder} holds no weights, such as {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}: download its files again."
        )
    files = sorted(set(_read_index(found).values())) if found.suffix == ".json" else [found]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that {found.name} names, such as "
            f"{missing[0]}: download its files again."
        )
    for file in files:
        read_tensors(file, None)


def read_weight_map(folder: Path) -> dict[str, Path]:
    """
    Return the file of every tensor in a folder, by an index or else the head of the only file; empty without weights.

    Raises:
        UserError: the index or the file is broken.
    """
    found = find_weights(folder)
    if found is None:
        return {}
    return _read_index(found) if found.suffix == ".json" else dict.fromkeys(read_tensors(found, None), found)


def read_tensors(file: Path, part: str | None) -> dict[str, Any]:
    """
    Return the tensors of a file by name, those alone with `part` in their name; the others are not read: `None`.

    Raises:
        UserError: the file is broken, or a pickle holds more than tensors; no code in it is run.
    """
    _check_file(file)
    try:
        if file.suffix == ".safetensors":
            # Opening compares the header's offsets with the file's size.
            with safe_open(file, "pt") as state:
                names = state.keys()
                return {name: state.get_tensor(name) if part and part in name else None for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol, about which a user can do nothing
            is_new_form = zipfile.is_zipfile(file)  # torch before 1.6 wrote another one, which cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_new_form)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is not a file of plain tensors ({type(error).__name__}), so it is not read and nothing in it is "
            "run: give the file that training wrote."
        ) from error
    except Exception as error:  # a broken file can fail in any way
        raise _broken(file, type(error).__name__) from error
    # Mapped into memory, so of a full model's tensors only those are ever read that are used.
    named = state if isinstance(state, dict) else {}
    return {name: value if part and part in name else None for name, value in named.items() if isinstance(name, str)}


def _check_file(file: Path) -> None:
    """Raise a `UserError` where a file of weights is missing, git's pointer to one, or broken by its head and end."""
    if not file.is_file():
        raise UserError(f"{file} is not there: copy or download {file.parent} again, whole.")
    with file.open("rb") as stream:
        head = stream.read(len(GIT_LFS_HEADER))
    if head == GIT_LFS_HEADER:
        raise UserError(f"{file} is a git-lfs pointer, not the weights themselves: run `git lfs pull` there.")
    # A zip file ends with its list of contents, which a cut one lacks; torch.load would take it for a pickle.
    is_whole = zipfile.is_zipfile(file) if head.startswith(_ZIP) else head.startswith(_PICKLE)
    if file.suffix == ".bin" and not is_whole:
        raise _broken(file, "it is none that torch.save wrote")


def _broken(file: Path, reason: str) -> UserError:
    size = file.stat().st_size
    return UserError(f"{file} is cut short or broken ({reason}, {size:,} bytes): copy or download it again.")


def _read_index(index: Path) -> dict[str, Path]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        foreign = next((name for name in shards.values() if Path(name).name != name), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of shards ({type(error).__name__}): copy it again.") from error
    if foreign is not None:  # it could point at any file of this machine
        raise UserError(f"{index} names a file of another folder ({foreign}), which is not read: copy it again.")
    return {name: index.parent / shard for name, shard in shards.items()}
