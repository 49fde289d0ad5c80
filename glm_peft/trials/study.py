"""The study of a search in its SQLite file: what was tried, what is tried next, and whose search it is."""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from glm_peft.errors import UserError

STUDY_NAME = "search"
DATABASE_NAME = "search.db"

OnEnd = Callable[[FrozenTrial, TrialState, float | None], None]

_LOCK_NAME = ".search.lock"
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """
    Around everything that writes into the folder of a search.

    Raises:
        UserError: another process is searching there.
    """
    with (folder / _LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another search is running in {folder}: wait for its end, or give another --output_dir."
            ) from error
        yield


def database_url(folder: Path) -> str:
    """What Optuna calls the file of a search."""
    return f"sqlite:///{(folder / DATABASE_NAME).absolute()}"


def open_study(folder: Path, direction: str, search: Mapping[str, Any]) -> optuna.Study:
    """
    The study in the folder, or a new one; no trial of it is running.

    Args:
        search: what makes it this search and no other, as JSON has it.

    Raises:
        UserError: the file is of another search, or is no file of a search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / DATABASE_NAME
    names = {"storage": database_url(folder), "study_name": STUDY_NAME}
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
    end_stopped_trials(study)
    return study


def end_stopped_trials(study: optuna.Study) -> None:
    """Those that a kill or a signal left running; without a reason to fail they count as not done."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended, and those that failed for a reason; one that was stopped is done again."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in _ENDED or (trial.state == TrialState.FAIL and "reason" in trial.user_attrs)
    ]


@contextmanager
def none_need_complete(study: optuna.Study, n_trials: int) -> Iterator[None]:
    """Around stock's search for so many trials, which fails at its end where none of them is complete."""
    try:
        yield
    except ValueError:
        counted = counted_trials(study)
        if len(counted) < n_trials or any(trial.state == TrialState.COMPLETE for trial in counted):
            raise  # it is about something else


class RepeatableSampler(optuna.samplers.BaseSampler):
    """
    Optuna's TPE, whose random numbers depend on the seed and on how many trials there were, and on nothing else.

    So a search that was stopped goes on with the values that it would have had; TPE's own would begin again with
    those of the first trials.

    Args:
        seed: 0 or more.
        random_trials: at the beginning, whose values do not depend on the trials before.
        on_end: is told of each trial that ends, with its state and value.
    """

    def __init__(self, seed: int, random_trials: int, on_end: OnEnd) -> None:
        self.seed, self.random_trials, self.on_end = seed, random_trials, on_end
        self._sampler = self._of_trial(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin the random numbers of this trial."""
        self._sampler = self._of_trial(len(counted_trials(study)))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """As TPE."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """As TPE."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
        """As TPE."""
        return self._sampler.sample_independent(study, trial, param_name, distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """As TPE; the only place where a study that stock runs tells of an end."""
        self._sampler.after_trial(study, trial, state, values)
        self.on_end(trial, state, values[0] if values else None)

    def _of_trial(self, number: int) -> optuna.samplers.TPESampler:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return optuna.samplers.TPESampler(n_startup_trials=self.random_trials, seed=seed, constant_liar=False)


def _check_same(path: Path, begun: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    # As JSON has both: a tuple comes back as a list.
    before, now = (json.loads(json.dumps(each)) for each in (begun, search))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{path} is of another search, with {name} {_shown(before.get(name))} where this one has "
                f"{_shown(now.get(name))}: go on with the same space and settings, or give another --output_dir."
            )


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
