"""
What is to be sent to the Hub, in a folder of the output: as it was when it was asked for, until it is there.

Each entry appears in one stroke and goes away after its files were seen on the Hub, so that a process that is killed
loses nothing; sending an entry again that is there already makes no second commit.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm_peft.hub.upload import Target, send, with_retries

QUEUE_NAME = "push_queue"

logger = logging.getLogger(__name__)

_RECORD, _FILES = "push.json", "files"


@dataclass(frozen=True)
class Entry:
    """One push that is not done yet."""

    folder: Path
    target: Target
    title: str

    def read_files(self, must_exist: bool = False) -> dict[str, bytes]:
        """The files by their names in the repository; none, or with `must_exist` an error, where it was removed."""
        root = (self.folder / _FILES).resolve(strict=must_exist)
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def remove(self) -> None:
        """Out of the queue in one stroke."""
        done = self.folder.with_name(f".sent-{self.folder.name}")
        with suppress(FileNotFoundError):  # another process has sent it, too, and found it there
            self.folder.replace(done)
        shutil.rmtree(done, ignore_errors=True)


class PushQueue:
    """
    The queue of an output folder.

    Args:
        output_dir: the folder that it is in.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir) / QUEUE_NAME

    def add(self, files: Mapping[str, bytes], target: Target, title: str) -> Entry:
        """Keep the files as they are now."""
        name = f"{time.time_ns():020d}"
        draft = self.folder / f".draft-{name}-{os.getpid()}"
        record = {"target": asdict(target), "title": title}
        contents = {f"{_FILES}/{file}": content for file, content in files.items()}
        for file, content in {**contents, _RECORD: json.dumps(record, ensure_ascii=False).encode()}.items():
            path = draft / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        return Entry(draft.replace(self.folder / name), target, title)

    def entries(self) -> list[Entry]:
        """What is waiting, the oldest first; what cannot be read is left where it is, with a warning."""
        entries = []
        for folder in sorted(self.folder.glob("[0-9]*")):
            try:
                record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
                target = Target(**{**record["target"], "tags": tuple(record["target"]["tags"])})
                entries.append(Entry(folder, target, record["title"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s cannot be read (%s): remove it, and push again.", folder, type(error).__name__)
        return entries

    def send_all(self, sleep: Callable[[float], Any] = time.sleep) -> list[str]:
        """
        Send what is waiting, in order.

        Returns:
            The addresses of the commits.

        Raises:
            Unsent: one could not be sent now; it and the later ones stay.
            UserError: one can never be sent as it is; it and the later ones stay.
        """
        addresses = []
        for entry in self.entries():
            addresses.append(send_entry(entry, sleep))
        self.tidy()
        return addresses

    def tidy(self) -> None:
        """Take the folder away where nothing is in it."""
        try:
            self.folder.rmdir()
        except OSError:
            return  # it is not there, or something is in it


def send_entry(entry: Entry, sleep: Callable[[float], Any] = time.sleep) -> str:
    """Send one entry, with retries, and take it out of the queue; returns the address of the commit."""
    files = entry.read_files()
    address = with_retries(lambda: send(files, entry.target, entry.title), sleep)
    entry.remove()
    return address


def find_queues(folder: str | Path) -> list[PushQueue]:
    """The queues of a folder and of those in it that hold something."""
    places = sorted({path.parent for path in Path(folder).rglob(QUEUE_NAME) if path.is_dir()})
    return [queue for queue in map(PushQueue, places) if queue.entries()]


def how_to_send(output_dir: str | Path) -> str:
    """The command for later."""
    return f"`python -m glm_peft.push --queued {output_dir}`"
