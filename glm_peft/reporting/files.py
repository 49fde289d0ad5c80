"""Write a file atomically, make an output folder, digest a file."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError

_CHUNK = 1 << 24  # bytes; a file of weights may be larger than memory


def digest_file(file: str | Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(file: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where there is no such file, or something else in it."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_atomically(path: str | Path, text: str) -> None:
    """Replace a file by a text in UTF-8, or leave it as it was where that fails."""
    path = Path(path)
    # In the same folder, as only within one file system a file replaces another in one step.
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            flush_to_disk(file)  # before the name is given: else a power cut can leave the name without the text
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def make_output_dir(folder: str | Path) -> Path:
    """
    Make a folder where it is not there yet, and see that it can be written to.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    folder = Path(folder)
    probe = folder / f".writable.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()  # the rights alone do not tell: a disk may be mounted read-only
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"--output_dir {folder} cannot be written to ({reason}): give a folder that can be."
        ) from error
    return folder


@contextmanager
def new_output_dir(folder: str | Path) -> Iterator[None]:
    """Make an output folder before anything takes long; take it away again where that fails with nothing in it."""
    is_new = not Path(folder).exists()
    make_output_dir(folder)
    try:
        yield
    except UserError:
        with suppress(OSError):  # it is not empty
            if is_new:
                Path(folder).rmdir()
        raise


def flush_to_disk(file: Any) -> None:
    """Write what Python and the system still hold of an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())
