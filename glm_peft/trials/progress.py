"""What a search shows while it runs: a bar over its trials, and a line for each that ended."""

import logging
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm
from transformers import TrainerCallback

from glm_peft.trials.report import describe_values

logger = logging.getLogger(__name__)


class SearchProgress(TrainerCallback):
    """
    The bar, which also says where the trial is that runs.

    Args:
        metric: name of what trials are judged by.
        minimize: whether less of it is better.
        best: of the trials before, if there were any.
        counts: trials in all, and those that are done.
        is_shown: whether there is a bar.
    """

    def __init__(
        self, metric: str, minimize: bool, best: float | None, counts: tuple[int, int], is_shown: bool
    ) -> None:
        self.metric, self.minimize, self.best = metric, minimize, best
        self.bar = tqdm(total=counts[0], initial=counts[1], desc="Trials", unit="trial", disable=not is_shown)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def begin(self, number: int, values: dict[str, Any]) -> None:
        """Tell the values of a trial."""
        logger.info("Trial %d: %s", number, describe_values(values))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far the trial is."""
        self._say(f"step {state.global_step} of {state.max_steps}")
        self.bar.update(0)  # draws it as often as tqdm finds right

    def end(self, trial: FrozenTrial, state: TrialState, value: float | None) -> None:
        """Tell how a trial ended; not of one that was stopped, which is done again."""
        if state == TrialState.COMPLETE:
            is_best = self.best is None or (value < self.best if self.minimize else value > self.best)
            self.best = value if is_best else self.best
            logger.info(
                "Trial %d: %s %.4f%s", trial.number, self.metric, value, ", the best so far" if is_best else ""
            )
        elif state == TrialState.PRUNED:
            step = max(trial.intermediate_values)
            logger.info("Trial %d: ended early at step %d, %s %.4f", trial.number, step, self.metric, value)
        elif "reason" in trial.user_attrs:
            logger.warning("Trial %d failed: %s", trial.number, trial.user_attrs["reason"])
        else:
            return
        self._say("")
        self.bar.update()

    def _say(self, where: str) -> None:
        best = "" if self.best is None else f"best {self.best:.4f}"
        self.bar.set_postfix_str(", ".join(filter(None, (where, best))), refresh=False)
