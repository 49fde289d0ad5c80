"""
Choose, check, publish and remove checkpoints, so that each is complete or does not exist.

A checkpoint is written in a temporary folder and moved to its place once it is on the disk, with a record of its
files. So neither a kill nor a full disk harms the one before, and truncated or corrupt files are found by the record.
"""

import errno
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file

from glm_peft.adapters.trained_state import ENCODER_NAME, TRAINED_NAME
from glm_peft.errors import UserError
from glm_peft.reporting.files import write_atomically
from glm_peft.training.parallel.agreement import agree_on_step

logger = logging.getLogger(__name__)

RECORD_NAME = "checkpoint_files.json"
UNFINISHED = "checkpoint-unfinished"
"""The folder in `output_dir` in which checkpoints are written and removed; it is absent between two saves."""

# Errors that the user mends, by making room or giving another folder; any other is our fault, with a traceback.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_CHUNK = 1 << 20  # bytes; a full model's weights need not fit into memory a second time


def choose_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """
    Return the checkpoint folder to resume from, or `None` for a fresh start.

    Args:
        resume_from_checkpoint: a folder; or `last` (or `true`), the newest complete one in `output_dir`, if any.

    Raises:
        UserError: there is no such folder, it is not complete, or another process would resume from another step.
    """
    given, fault = resume_from_checkpoint, None
    if given is None or given.lower() == "false":
        chosen = None
    elif given.lower() in ("last", "true"):
        chosen = _choose_last(Path(output_dir))
    else:
        fault = find_fault(Path(given)) if Path(given).is_dir() else "there is no such folder"
        chosen = None if fault else given
    # Before the fault is raised: a process that left here would let the others wait for it in vain.
    agree_on_step(_step_of(chosen))
    if fault:
        raise UserError(
            f"--resume_from_checkpoint {given} is no complete checkpoint ({fault}): give another one, or last, or "
            "start from an adapter with --adapter_name_or_path."
        )
    return chosen


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders `checkpoint-N` whose files have their full size, in the order in which they were written."""
    # Sizes alone: this runs at every save, and reading all files again would take as long as writing them.
    return [folder for folder in _in_order(Path(output_dir)) if not find_fault(folder, read_all=False)]


def last_good_checkpoint(output_dir: str | Path) -> str:
    """Return the end of a sentence that names the newest complete checkpoint whose parameters are all finite."""
    for folder in reversed(complete_checkpoints(output_dir)):
        if _is_finite(folder):
            return f"the last good checkpoint is {folder}"
    return "there is no good checkpoint yet"


def find_fault(folder: Path, read_all: bool = True) -> str | None:
    """
    Return why training cannot resume from the folder, or `None` where it can.

    Args:
        read_all: whether to compare the checksum of every file, too, or only the sizes.
    """
    record = read_record(folder)
    if record is None:
        return f"it lacks {RECORD_NAME}, which is written last"
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            return f"it lacks {name}"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} of {expected['bytes']} bytes"
        if read_all and _checksum(path) != expected["crc32"]:
            return f"{name} is not what was written: its checksum differs"
    return None if record["resumable"] else "it lacks the optimizer, as it was saved with --save_only_model"


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """
    Read what is recorded of a checkpoint; `None` where it is none.

    Returns:
        `started_at`, when its run was begun first, `saved_at` (both in seconds), `processes`, `engine`, the backend
        that shared the run among them, `resumable`, and `files` with the `bytes` and `crc32` of each.
    """
    try:
        record = json.loads((Path(folder) / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= {"saved_at", "files", "resumable"} else None


def publish_checkpoint(folder: Path, resumable: bool, processes: int = 1, **facts: Any) -> None:
    """
    Record the files of a checkpoint in `UNFINISHED`, once they are on the disk, and move it to its place.

    Args:
        folder: `output_dir/checkpoint-unfinished/checkpoint-N`.
        resumable: whether the optimizer and the random state are in it.
        processes: how many processes wrote it.
        facts: what else is recorded of the run: `engine` and `started_at`, see `read_record`.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _checksum(path, to_disk=True)}
        for path in paths
    }
    record = {"saved_at": time.time(), "processes": processes, "resumable": resumable, **facts, "files": files}
    # Last: where there is a record, all that it lists was flushed to the disk before.
    write_atomically(folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    place = folder.parents[1] / folder.name
    if place.exists():  # of an earlier run; a folder that is not empty cannot be replaced
        _set_aside(place)
    folder.replace(place)
    _flush_folder(place.parent)
    remove_unfinished(place.parent)


def rotate_checkpoints(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest complete checkpoints beyond the limit, but never the newest or the best."""
    found = complete_checkpoints(output_dir)
    protected = [folder for folder in found if folder == found[-1] or (best and folder.resolve() == _resolve(best))]
    surplus = len(found) - max(limit or len(found), len(protected))
    for folder in [folder for folder in found if folder not in protected][: max(surplus, 0)]:
        _set_aside(folder)
    remove_unfinished(output_dir)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove the folder in which a run that was killed was writing or removing checkpoints."""
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)


@contextmanager
def explain_failed_writing(what: str, output_dir: str | Path) -> Iterator[None]:
    """
    Turn an error in writing to `output_dir` into a `UserError` that names the last good checkpoint.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason_of_failed_writing(error)
        if reason is None:
            raise
        remove_unfinished(output_dir)  # gives a full disk back the space of what was written so far
        raise UserError(
            f"{what} cannot be written to {output_dir} ({reason}): make room there, or give another --output_dir; "
            f"{last_good_checkpoint(output_dir)}."
        ) from error


def _is_finite(folder: Path) -> bool:
    own = [folder / name for name in (ENCODER_NAME, TRAINED_NAME) if (folder / name).is_file()]
    # Where the base itself is trained, its weights are the trained parameters.
    files = own or sorted(folder.glob("model*.safetensors"))
    return all(bool(value.isfinite().all()) for file in files for value in load_file(file).values())


def _choose_last(output_dir: Path) -> str | None:
    # The others wait, or they would look for a checkpoint while it is moved.
    with PartialState().main_process_first():
        _put_back(output_dir)
    faults, chosen = {}, None
    for folder in reversed(_in_order(output_dir)):
        faults[folder] = find_fault(folder)  # with checksums: a damaged file could load without an error
        if not faults[folder]:
            chosen = folder
            break
    unfinished = {folder: find_fault(folder) for folder in (output_dir / UNFINISHED).glob("checkpoint-*")}
    place = chosen or f"the beginning: no checkpoint is in {output_dir}"
    for folder, fault in (faults | unfinished).items():
        if fault:
            logger.warning("%s is incomplete (%s): going on from %s", folder, fault, chosen or "the beginning")
    logger.info("Going on from %s", place)
    return str(chosen) if chosen else None


def _step_of(checkpoint: str | None) -> int | None:
    if checkpoint is None:
        return None
    from transformers.trainer import TRAINER_STATE_NAME  # which imports what only training needs

    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _in_order(output_dir: Path) -> list[Path]:
    """Return every `checkpoint-N`, the one written last at the end: an earlier run may have reached a larger N."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: (_saved_at(path), int(path.name.rpartition("-")[2])))


def _saved_at(folder: Path) -> float:
    record = read_record(folder)
    return record["saved_at"] if record else folder.stat().st_mtime


def _set_aside(folder: Path) -> None:
    """Move a checkpoint away by one rename: a kill while its files are deleted would leave a part of it in place."""
    aside = folder.parent / UNFINISHED / "former" / folder.name
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    folder.replace(aside)


def _put_back(output_dir: Path) -> None:
    """Move complete checkpoints back that a kill between two renames left in `UNFINISHED`."""
    for folder in (output_dir / UNFINISHED).glob("**/checkpoint-*"):
        place = output_dir / folder.name
        if not place.exists() and not find_fault(folder):
            folder.replace(place)


def _checksum(path: Path, to_disk: bool = False) -> str:
    value = 0
    with path.open("rb+" if to_disk else "rb") as file:  # Windows flushes only what is open for writing
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
        if to_disk:
            os.fsync(file.fileno())
    return f"{value:08x}"


def _flush_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it outlasts a loss of power; not every system can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _resolve(path: str) -> Path:
    return Path(path).resolve()


def _reason_of_failed_writing(error: Exception) -> str | None:
    """Return why the disk or the folder failed; `None` where the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _FULL | _UNWRITABLE else None
    if isinstance(error, SafetensorError):
        # Rust's text is all there is: the error has no `errno`.
        number = re.search(r"os error (\d+)", str(error))
        return os.strerror(int(number[1])) if number else None
    # torch.save says neither the file nor the reason.
    of_torch = re.search(r"inline_container|PytorchStreamWriter|Parent directory", str(error))
    return "torch could not write a file to its end, most likely as the disk is full" if of_torch else None
