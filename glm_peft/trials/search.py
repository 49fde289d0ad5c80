"""Run a search: trials that Optuna chooses, one after the other, and a report on all."""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from accelerate.utils.memory import should_reduce_batch_size
from optuna.distributions import distribution_to_json
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from glm_peft.arguments.search import SearchArguments, Settings, may_change
from glm_peft.arguments.sources import read_train_sources
from glm_peft.arguments.splits import validation_files
from glm_peft.arguments.training import TrainArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import check_base_weights, load_config
from glm_peft.provenance.ownership import digest_weights
from glm_peft.provenance.recipe import select_scores
from glm_peft.reporting.files import digest_file, make_output_dir, write_atomically
from glm_peft.reporting.results import print_section
from glm_peft.trials.report import (
    BEST_NAME,
    CSV_NAME,
    STATES,
    describe_values,
    format_trials,
    plot_search,
    tabulate_trials,
    write_best,
)
from glm_peft.trials.space import check_space, draw_settings, read_space
from glm_peft.trials.study import REASON, counted_trials, hold_folder, open_study, reseed
from glm_peft.trials.trial import Workbench, compute_objective, parse_trial, resolve_trial, run_trial

logger = logging.getLogger(__name__)

_TRIALS = "trials"


class Search:
    """
    A search, from its arguments to its report.

    Args:
        search_args: the arguments of the search itself.
        settings: the settings of training that every trial starts from.

    Raises:
        UserError: the space or the settings are wrong.
    """

    def __init__(self, search_args: SearchArguments, settings: Settings) -> None:
        self.search_args, self.settings = search_args, settings
        self.folder = Path(settings["output_dir"][-1])
        self.metric = f"eval_{search_args.metric}"
        self.space = read_space(search_args.space)
        self.names = [parameter.name for parameter in self.space]
        if search_args.trial_steps and {"max_steps", "num_train_epochs"} & {*self.names}:
            raise UserError(
                "--trial_steps gives all trials one length, which the space varies: leave one of them out."
            )
        with without_warnings():
            arguments = self.parse_trial(settings)
            # The config alone, without weights: what is wrong in the space is told within seconds.
            self.config = load_config(arguments.model)
            check_base_weights(arguments.model)
            check_space(self.space, settings, search_args.metric, self.parse)
            self.arguments = resolve_trial(arguments, self.config)

    def run(self) -> None:
        """
        Run the trials that are left, and report on all.

        Raises:
            UserError: the folder is of another search, or no trial came to its end.
        """
        make_output_dir(self.folder)
        with hold_folder(self.folder):
            study = open_study(self.folder, self.search_args.direction, self.describe())
            try:
                self.run_trials(study)
            finally:  # at Ctrl-C, too
                best = self.report(study)
        if best is None:
            raise UserError(
                f"None of {self.search_args.n_trials} trials came to its end, for the reasons above: narrow "
                f"{self.search_args.space} or change what all trials share, and give another --output_dir."
            )

    def run_trials(self, study: optuna.Study) -> None:
        """Run the trials that are left of `--n_trials`; table and configuration are written after each."""
        args, done = self.search_args, len(counted_trials(study))
        if done >= args.n_trials:
            return
        if args.stop_early and self.arguments.training.eval_strategy == "no":
            logger.info("No trial ends early, as none is evaluated on its way: --eval_strategy steps would do that.")
        workbench = Workbench(self.arguments)
        # The median of fewer trials than are random would end good ones by chance.
        study.pruner = (
            optuna.pruners.MedianPruner(args.random_trials) if args.stop_early else optuna.pruners.NopPruner()
        )

        def end_trial(study: optuna.Study, trial: FrozenTrial) -> None:
            logger.info("Trial %d: %s", trial.number, self.describe_end(trial))
            self.write_files(study)
            # After this trial counts: the seed of the next one depends on the number of trials that do.
            reseed(study, args.sampler_seed, args.random_trials)

        reseed(study, args.sampler_seed, args.random_trials)
        with without_warnings():
            study.optimize(
                lambda trial: self.try_trial(trial, workbench),
                n_trials=args.n_trials - done,
                callbacks=[end_trial],
                gc_after_trial=True,  # models refer to themselves, and memory is short
            )

    def try_trial(self, trial: optuna.Trial, workbench: Workbench) -> float:
        """
        Run a trial, which may fail.

        Returns:
            The result that trials are compared by; NaN for a trial that failed.
        """
        try:
            settings = draw_settings(self.space, self.settings, trial)
            logger.info("Trial %d: %s", trial.number, describe_values(trial, self.names))
            arguments = self.parse(settings, trial.number)
            metrics = run_trial(workbench, arguments, trial, self.search_args.metric)
            value = compute_objective(metrics, self.search_args.metric)
        except (UserError, RuntimeError, MemoryError) as error:
            # accelerate knows how each device words a lack of memory; any other error ends the search.
            is_full = isinstance(error, MemoryError) or should_reduce_batch_size(error)
            if not is_full and not isinstance(error, UserError):
                raise
            trial.set_user_attr(REASON, "out of memory" if is_full else str(error))
            return math.nan  # which Optuna takes for failed and goes on, where an exception would end the search
        finally:
            if not self.search_args.keep_checkpoints:
                shutil.rmtree(self.folder / _TRIALS, ignore_errors=True)  # also those of a trial that a kill stopped
        for name, score in select_scores(metrics).items():
            trial.set_user_attr(name, score)
        return value

    def describe_end(self, trial: FrozenTrial) -> str:
        """Return how a trial ended, for the log."""
        # The value of a pruned trial is the last that it reported, by Optuna.
        what = trial.user_attrs[REASON] if trial.value is None else f"{self.metric} {trial.value:.4f}"
        return f"{STATES[trial.state.name]}, {what}"

    def parse(self, settings: Settings, number: int = 0) -> TrainArguments:
        """Return the arguments of a trial with these settings, resolved."""
        return resolve_trial(self.parse_trial(settings, number), self.config)

    def parse_trial(self, settings: Settings, number: int = 0) -> TrainArguments:
        """Return the arguments of a trial with these settings, of which only it has `--trial_steps`."""
        steps = self.search_args.trial_steps
        settings = settings | ({"max_steps": [str(steps)]} if steps else {})
        return parse_trial(settings, self.folder / _TRIALS / str(number), self.search_args.keep_checkpoints)

    def describe(self) -> dict[str, Any]:
        """Return all that must stay the same for a search to be continued in its folder."""
        own = ("metric", "trial_steps", "random_trials", "stop_early", "sampler_seed", "keep_checkpoints")
        described: dict[str, Any] = {f"--{name}": getattr(self.search_args, name) for name in own}
        fixed = {name: words for name, words in self.settings.items() if name not in self.names}
        described |= {f"--{name}": " ".join(words) for name, words in fixed.items() if not may_change(name)}
        values = {each.name: json.loads(distribution_to_json(each.distribution))["attributes"] for each in self.space}
        described |= {f"{name} in the space": value for name, value in values.items()}
        data_args = self.arguments.data
        sources = {source.name: source.file for source in read_train_sources(data_args.train_file)}
        files = (sources or {"train": data_args.train_file}) | validation_files(data_args.validation_file)
        # By their content, as a file may have been replaced under its name; Hub data sets are known by name alone.
        there = {name: file for name, file in files.items() if file and Path(file).is_file()}
        adapter = self.arguments.model.adapter_name_or_path
        described |= {"adapter of sha256": digest_weights(adapter)} if adapter else {}
        return described | {f"{name} rows of sha256": digest_file(file) for name, file in there.items()}

    def report(self, study: optuna.Study) -> FrozenTrial | None:
        """Write the files, print the table, and return the best trial."""
        if not counted_trials(study):
            return None
        best = self.write_files(study)
        table = tabulate_trials(study)
        title = f"{len(table)} trial{'s' if len(table) > 1 else ''}, the best first"
        print_section(title, format_trials(table, self.metric, self.names, self.search_args.direction == "minimize"))
        if best:
            found = f"  trial {best.number}, {self.metric} {best.value:.4f}: {describe_values(best, self.names)}"
            files = [self.folder / CSV_NAME, *plot_search(study, self.metric, self.folder)]
            more = ", ".join(map(str, files))
            length = "" if self.search_args.trial_steps else ", as long as a trial (--max_steps behind it says longer)"
            print_section("The best", f"{found}\nTrain it with{length}\n  {self.training_command}\nMore: {more}")
        return best

    def write_files(self, study: optuna.Study) -> FrozenTrial | None:
        """Write the table and the configuration of the best trial, and return that trial."""
        write_atomically(self.folder / CSV_NAME, tabulate_trials(study).to_csv(index=False))
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            return None
        best = study.best_trial
        # A FixedTrial suggests the values that it is given: the settings come about as they did in the trial.
        settings = draw_settings(self.space, self.settings, FixedTrial(best.params))
        write_best(self.folder, best, self.metric, settings, self.training_command)
        return best

    @property
    def training_command(self) -> str:
        """Return the command that trains by the configuration of the best trial."""
        device = "cpu" if self.arguments.training.device.type == "cpu" else "single_gpu"
        command = f"accelerate launch --quiet --config_file accelerate_configs/{device}.yaml "
        return command + f"glm_peft/train.py {self.folder / BEST_NAME}"


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence the warnings of the arguments inside: they were given when the command itself was parsed."""
    loggers = [logging.getLogger(f"glm_peft.{name}") for name in ("arguments.command_line", "adapters.saved_adapter")]
    former = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, former, strict=True):
            logger.setLevel(level)
