"""Keep the record of a run through every stretch of its training: stopped and resumed, or going on from an adapter."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from glm_peft.errors import UserError
from glm_peft.provenance.ownership import WEIGHTS_KEY
from glm_peft.provenance.record import as_flags, as_mapping, read_provenance, today, write_provenance

logger = logging.getLogger(__name__)

_OF_BASE = ("base", "chat_format", "metric_protocol")
_SAME = ("data", "recipe")  # what a stretch shares with the one before where both make one run


class RunRecord:
    """
    The record of a training run, which grows with its steps.

    Args:
        facts: what `describe_origin` returned; empty in processes other than the main one.
        checkpoint: the folder that the run is resumed from.
        adapter: the folder or Hub id that it starts from.
    """

    def __init__(self, facts: Mapping[str, Any], checkpoint: str | None = None, adapter: str | None = None) -> None:
        self.facts, self.start = facts, "checkpoint" if checkpoint else "adapter" if adapter else "new"
        source = checkpoint or adapter
        self.former = read_provenance(source) if source and facts else {}
        self.first_step, self._began = 0, time.perf_counter()
        if checkpoint:
            _warn_of_other_prompt(checkpoint, as_mapping(self.former.get("prompt")), as_mapping(facts.get("prompt")))

    def begin(self, step: int) -> None:
        """Note the step after which this stretch begins."""
        self.first_step, self._began = step, time.perf_counter()

    def has_steps(self, step: int) -> bool:
        """Return whether a step was taken; a run that is resumed at its end takes none."""
        return self.start != "checkpoint" or step > self.first_step

    def up_to(self, step: int, seconds: float | None = None) -> dict[str, Any]:
        """
        Return the record at a step: where none was taken, that of the checkpoint as it was.

        Args:
            seconds: since this stretch began; `None` for those until now.
        """
        if not self.has_steps(step):
            # Where the checkpoint has no record, nobody knows how it was trained.
            known = self.former or {name: self.facts[name] for name in _OF_BASE if name in self.facts}
            return {name: value for name, value in known.items() if name != WEIGHTS_KEY}
        stretch = {
            "start": self.start,
            "steps": [self.first_step, step],
            "seconds": round(time.perf_counter() - self._began, 4) if seconds is None else seconds,
            "data": as_mapping(self.facts.get("data")).get("train"),
            "recipe": self.facts.get("recipe"),
            "date": today(),
        }
        return {**self.facts, "stretches": [*read_stretches(self.former), stretch]}

    def write(self, folder: str | Path, step: int, weights: str | None, results: Mapping[str, Any]) -> None:
        """
        Write `provenance.json` into the output folder; where no step was taken, a record that is there is kept.

        Args:
            weights: the digest of the weights in the folder.
        """
        if not self.facts or (not self.has_steps(step) and self._is_of_others(read_provenance(str(folder)))):
            return
        record = {**self.up_to(step, results.get("train_runtime")), WEIGHTS_KEY: weights}
        write_provenance(folder, record, results)

    def _is_of_others(self, written: Mapping[str, Any]) -> bool:
        """Return whether other flags led to a record; with the same ones the command does what was left of a run."""
        own = json.loads(json.dumps(self.facts.get("flags"), default=str))  # as the record was written
        return bool(written) and written.get("flags") != own


def read_stretches(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stretches of training that a record tells; one of data alone from an earlier version's record."""
    known, data = record.get("stretches"), as_mapping(record.get("data")).get("train")
    if isinstance(known, list):
        return [stretch for stretch in known if isinstance(stretch, dict)]
    return [{"data": data}] if data else []


def can_be_repeated(record: Mapping[str, Any]) -> bool:
    """Return whether one command makes the whole: a new run, resumed with the same data and settings if at all."""
    stretches = read_stretches(record)
    if not any("start" in stretch for stretch in stretches):  # of an earlier version
        return not record.get("resumed")
    starts = [stretch.get("start") for stretch in stretches]
    is_one_run = starts == ["new", *["checkpoint"] * (len(starts) - 1)]
    return is_one_run and all(stretch.get(name) == stretches[0].get(name) for name in _SAME for stretch in stretches)


def check_same_rows(checkpoint: str | Path | None, data: Mapping[str, Any]) -> None:
    """
    Compare the rows of training with those that a checkpoint was trained on; must be called in all processes.

    Args:
        checkpoint: the folder to resume from.
        data: what `describe_data` returned.

    Raises:
        UserError: they differ; raised in all processes, so that none waits for the others.
    """
    if checkpoint is None:
        return
    before, now = read_stretches(read_provenance(str(checkpoint)) if data else {}), data.get("train", {})
    former = as_mapping(before[-1].get("data")) if before else {}
    # The file's own digest only where an earlier version recorded no other: the same rows may come in another form.
    names = ("rows_sha256",) if "rows_sha256" in former else ("sha256", "rows")
    differs = any(former[name] != now.get(name) for name in names if name in former)
    (found,) = broadcast_object_list([_compare(former, now) if differs else None])
    if found:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} goes on with the rows that it was trained on, and these are "
            f"others ({found}): give the same data, or start on these from its adapter with --adapter_name_or_path "
            f"{checkpoint}."
        )


def _warn_of_other_prompt(checkpoint: str, former: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in former if name in now and former[name] != now[name]]
    if differing:
        there, here = (as_flags({name: prompt[name] for name in differing}) for prompt in (former, now))
        logger.warning(
            f"{checkpoint} was trained with {there}, and this run goes on with {here}: give what the checkpoint was "
            "trained with, unless other prompts are meant from here on."
        )


def _tell_rows(data: Mapping[str, Any]) -> str:
    if "shuffle_buffer_size" not in data:
        return str(data.get("rows"))
    return f"a stream (--shuffle_buffer_size {data['shuffle_buffer_size']}, --rows_seed {data.get('seed')})"


def _compare(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    there, here = (
        f"{_tell_rows(data)} of {data.get('file') or data.get('dataset')}, "
        f"sha256 {str(data.get('rows_sha256') or data.get('sha256'))[:12]}"
        for data in (former, now)
    )
    return f"{there} there, {here} here"
