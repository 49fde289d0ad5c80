"""Write the files of a prediction run: the answers batch by batch, to resume from, and the finished file."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from glm_peft.errors import UserError
from glm_peft.reporting.files import flush_to_disk, write_atomically

logger = logging.getLogger(__name__)

# Each process writes its own, as appends of several to one file could mix: the second, ….partial.1.jsonl.
PARTIAL_NAME = "generated_predictions.partial.jsonl"
OTHER_RUN_NAME = PARTIAL_NAME.replace("partial", "other_run")


def write_predictions(
    path: str | Path,
    prompts: Sequence[str],
    references: Sequence[str | None],
    answers: Sequence[str],
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """
    Write one JSON object a row: `prompt`, `labels` (null where there is none), `predict`, and what `rows` add.

    A reader sees the file that was there before or the complete new one, never a part.
    """
    lines = zip(prompts, references, answers, rows or [{}] * len(answers), strict=True)
    objects = ({"prompt": prompt, "labels": labels, "predict": answer, **row} for prompt, labels, answer, row in lines)
    write_atomically(path, "".join(map(_json_line, objects)))


def check_resumable(folder: str | Path, resume: bool) -> None:
    """
    Refuse to overwrite a stopped run; to be called before anything that takes long.

    Raises:
        UserError: the folder has a file of a stopped run, and `resume` is not set.
    """
    for path in partial_files(folder):
        if not resume:
            raise UserError(
                f"{path} has the answers of a stopped run: add --resume to go on with it, or remove it to start anew."
            )


def partial_files(folder: str | Path) -> list[Path]:
    """List the files that a stopped run left in the folder: one of each process that had answers."""
    return sorted(Path(folder).glob(PARTIAL_NAME.replace(".jsonl", "*.jsonl")))


class PartialPredictions:
    """
    Answers of an unfinished run, one line each behind a first line that says which run it is.

    Each batch is on the disk before the next one starts; before the first, there is no file. `answers` has all of
    them by row number, those of the other processes of a stopped run too.
    """

    way_on = "the same command with --resume"

    def __init__(self, folder: str | Path, run: Mapping[str, Any], resume: bool) -> None:
        """
        Read what a stopped run left in the folder.

        Args:
            folder: where the predictions will be.
            run: what the answers depend on; values that JSON has.
            resume: whether to go on with the files of a stopped run, if there are some.

        Raises:
            UserError: the folder has a file of a stopped run and `resume` is not set, or one of another run.
        """
        check_resumable(folder, resume)
        self.path, self.run = _own_path(Path(folder)), dict(run)
        self.answers: dict[int, str] = {}
        self._ends: dict[Path, int] = {}
        # All files, not only this process's: the stopped run may have had another number of processes.
        for path in partial_files(folder):
            answers, self._ends[path] = _read(path, self.run)
            self.answers |= answers
        self._file: BinaryIO | None = None

    def __enter__(self) -> "PartialPredictions":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._file:
            self._file.close()
        if error_type and (files := partial_files(self.path.parent)):
            kept = f"{len(self.answers)} answers are in {files[0]}"
            if len(files) > 1:
                kept = f"answers are in {files[0]} and {len(files) - 1} more such files"
            logger.warning("Stopped: %s; %s goes on from there.", kept, self.way_on)

    def add(self, rows: Sequence[int], answers: Sequence[str]) -> None:
        """Write the answers of a batch to the disk."""
        if self._file is None:
            self._open()
        self._append([{"row": row, "predict": answer} for row, answer in zip(rows, answers, strict=True)])
        self.answers.update(zip(rows, answers, strict=True))

    def remove(self) -> None:
        """Remove the files of all processes, once the answers are in the finished file."""
        if self._file:
            self._file.close()
        # A process that still read or wrote one would lose answers.
        PartialState().wait_for_everyone()
        for path in partial_files(self.path.parent):
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        self._file = self.path.open("ab")
        end = self._ends.get(self.path, 0)
        self._file.truncate(end)  # off goes a line that was being written when the run was stopped
        if not end:
            self._append([{"run": self.run}])

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._file.write("".join(_json_line(line) for line in lines).encode())
        flush_to_disk(self._file)


@contextmanager
def keep_predictions(folder: str | Path, run: Mapping[str, Any]) -> Iterator[PartialPredictions]:
    """
    Keep the answers of a prediction that follows training, and go on with those of the same run, if any.

    Args:
        run: what the answers depend on; the first process's counts.
    """
    (run,) = broadcast_object_list([run])
    # An error, as in `predict`, would come after hours of training: other runs' answers are renamed instead.
    with PartialState().local_main_process_first():
        _put_other_runs_aside(folder, run)
    partial = PartialPredictions(folder, run, resume=True)
    partial.way_on = "the same command with --resume_from_checkpoint last"
    with partial:
        yield partial
        partial.remove()


def _own_path(folder: Path) -> Path:
    number = PartialState().process_index
    return folder / (PARTIAL_NAME.replace(".jsonl", f".{number}.jsonl") if number else PARTIAL_NAME)


def _put_other_runs_aside(folder: str | Path, run: Mapping[str, Any]) -> None:
    for path in partial_files(folder):
        try:
            _read(path, run)
        except UserError:
            aside = path.with_name(path.name.replace("partial", "other_run"))
            path.replace(aside)
            logger.warning("%s is of another run: it is now called %s.", path, aside.name)


def _read(path: Path, run: Mapping[str, Any]) -> tuple[dict[int, str], int]:
    """Read the answers in the complete lines of a file, by row, and the byte at which those lines end."""
    lines = list(_whole_lines(path.read_bytes()))
    if not lines:
        return {}, 0
    _check_run(path, lines[0][0].get("run"), run)
    return {line["row"]: line["predict"] for line, _ in lines[1:]}, lines[-1][1]


def _check_run(path: Path, begun: Any, run: Mapping[str, Any]) -> None:
    begun = begun if isinstance(begun, dict) else {}
    for name in (name for name in run if begun.get(name) != run[name]):
        raise UserError(
            f"{path} is of another run, with {name} {begun.get(name)!r} where this one has {run[name]!r}: resume with "
            "the same arguments and files, or remove it to start anew."
        )


def _whole_lines(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Read the lines before the first incomplete one, each with the byte at which it ends."""
    end = 0
    for line in BytesIO(content):
        try:
            values = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            values = None
        if not isinstance(values, dict):
            logger.warning(
                "The stopped run's last %d bytes are incomplete: their rows are answered again.", len(content) - end
            )
            return
        end += len(line)
        yield values, end


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
