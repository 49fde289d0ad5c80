"""Open the Optuna study of a search in its folder, continue it after a stop, and seed what it draws."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from glm_peft.errors import UserError

STUDY_NAME = "search"
DATABASE_NAME = "search.db"
REASON = "reason"
"""Optuna's user attribute of a failed trial, which tells why; a trial that was stopped has none."""

_LOCK_NAME = ".search.lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """
    Keep other searches out of a folder.

    Raises:
        UserError: another process is searching there.
    """
    # Optuna lets several processes share a study. The lock ends with the process, however that is killed.
    try:
        lock = FileLock(folder / _LOCK_NAME).acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"Another search is running in {folder}: wait for its end, or give another --output_dir."
        ) from error
    with lock:
        yield


def open_study(folder: Path, direction: str, search: Mapping[str, Any]) -> optuna.Study:
    """
    Open the study in a folder, or create it, and set trials that a kill left running to failed.

    Args:
        folder: held by `hold_folder`.
        direction: `minimize` or `maximize`.
        search: all that must stay the same for the search to be continued, as JSON has it.

    Raises:
        UserError: the file is of another search, or is no file of a search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # at lower levels it logs a traceback for Ctrl-C
    path = folder / DATABASE_NAME
    names = {"storage": f"sqlite:///{path.absolute()}", "study_name": STUDY_NAME}
    try:
        study = optuna.create_study(direction=direction, load_if_exists=True, **names)
        if not counted_trials(study):  # what it was begun with may have been a mistake
            optuna.delete_study(**names)
            study = optuna.create_study(direction=direction, **names)
            study.set_user_attr("search", dict(search))
    except Exception as error:  # SQLAlchemy's own, of many kinds
        raise UserError(
            f"{path} cannot be used as the file of a search ({type(error).__name__}): remove it to start anew, or "
            "give another --output_dir."
        ) from error
    _check_same(path, study.user_attrs["search"], search)
    # Optuna's heartbeat would do so after a minute at the earliest; who holds the folder knows that none is running.
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended by themselves, without those that were stopped and are to be done again."""
    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [trial for trial in trials if trial.state != TrialState.FAIL or REASON in trial.user_attrs]


def reseed(study: optuna.Study, seed: int, random_trials: int) -> None:
    """
    Make the next trial's values depend on the seed and on the trials that count, and on nothing else.

    Args:
        seed: 0 or more.
        random_trials: number of trials at the beginning whose values do not depend on the trials before.
    """
    # A sampler that went on would have drawn another number of values after a stop than without it. A SeedSequence,
    # as the sum of both numbers would give seed 1 the draws that seed 0 has one trial later.
    own = np.random.SeedSequence([seed, len(counted_trials(study))]).generate_state(1)[0]
    # One trial runs at a time, and so needs no distance from others that run, which Optuna would keep by default.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=random_trials, seed=int(own), constant_liar=False)


def _check_same(path: Path, begun: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    for name in sorted(begun.keys() | search.keys()):
        before, now = (
            json.dumps(each[name], ensure_ascii=False) if name in each else "not given" for each in (begun, search)
        )
        if before != now:
            raise UserError(
                f"{path} is of another search, with {name} {before} where this one has {now}: go on with the same "
                "space and settings, or give another --output_dir."
            )
