"""Write a file as a whole or not at all, make an output folder, digest a file."""

import hashlib
import os
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError

_CHUNK = 1 << 24


def digest_file(file: str | Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces the file by the text, UTF-8, or leaves it as it was."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            flush_to_disk(file)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def make_output_dir(folder: str | Path) -> Path:
    """
    The folder, made where it is not there yet.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    folder = Path(folder)
    probe = folder / f".writable.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"--output_dir {folder} cannot be written to ({reason}): give a folder that can be."
        ) from error
    return folder


def flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
