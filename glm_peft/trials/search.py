"""Run a search: trials that Optuna chooses, one after the other, and a report on all."""

import logging
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from glm_peft.arguments.search import SearchArguments, Settings, may_change
from glm_peft.arguments.splits import validation_files
from glm_peft.arguments.training import TrainArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import load_config
from glm_peft.provenance.recipe import select_scores
from glm_peft.reporting.files import digest_file, make_output_dir, write_atomically
from glm_peft.reporting.results import print_section
from glm_peft.trials.report import (
    BEST_NAME,
    CSV_NAME,
    describe_values,
    find_best,
    format_trials,
    plot_search,
    rank_trials,
    tabulate_trials,
    write_best,
)
from glm_peft.trials.space import check_space, draw_settings
from glm_peft.trials.space_file import read_space
from glm_peft.trials.stopping import StoppedBySignal, raising_at_signals
from glm_peft.trials.study import REASON, counted_trials, fail_running_trials, hold_folder, open_study, reseed
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
        arguments = parse_trial(settings, self.folder)
        # The config alone, without weights: what is wrong in the space is told within seconds.
        self.config = load_config(arguments.model)
        with without_warnings():
            check_space(self.space, settings, search_args.metric, self.parse)
            self.arguments = resolve_trial(arguments, self.config)

    def run(self) -> None:
        """
        Run the trials that are left, and report on all.

        Raises:
            SystemExit: with 130 or 143, after Ctrl-C or SIGTERM.
            UserError: the folder is of another search, or no trial came to its end.
        """
        make_output_dir(self.folder)
        with hold_folder(self.folder), raising_at_signals():
            study, stop = open_study(self.folder, self.search_args.direction, self.describe()), None
            try:
                self.run_trials(study)
            except StoppedBySignal as signalled:
                stop = signalled
            # A signal may have come where Optuna does not catch it, outside of the trial itself.
            fail_running_trials(study)
            self.remove_stopped(study)
            with suppress(OSError):  # it holds checkpoints that are kept
                (self.folder / _TRIALS).rmdir()
            best, done = self.report(study), len(counted_trials(study))
        if stop is not None:
            kept = f"{done} of {self.search_args.n_trials} trials are in {self.folder}"
            print(f"stopped: {kept}; the same command goes on from there", file=sys.stderr)
            sys.exit(stop.exit_code)
        if best is None:
            raise UserError(
                f"None of {done} trials came to its end, for the reasons above: narrow {self.search_args.space} or "
                "change the settings that all trials share, and give another --output_dir."
            )

    def remove_stopped(self, study: optuna.Study) -> None:
        """Remove what is left of trials that a kill stopped, unless checkpoints are kept."""
        numbers = {trial.number for trial in study.trials} - {trial.number for trial in counted_trials(study)}
        for number in numbers if not self.search_args.keep_checkpoints else ():
            shutil.rmtree(self.folder_of(number), ignore_errors=True)

    def run_trials(self, study: optuna.Study) -> None:
        """Run the trials that are left of `--n_trials`."""
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
        is_quiet = self.settings.get("disable_tqdm", ["false"])[-1].lower() == "true"
        bar = tqdm(total=args.n_trials, initial=done, desc="Trials", unit="trial", disable=is_quiet)

        def end_trial(study: optuna.Study, trial: FrozenTrial) -> None:
            logger.info("Trial %d: %s", trial.number, self.describe_end(study, trial))
            bar.update()
            # After this trial counts: the seed of the next one depends on the number of trials that do.
            reseed(study, args.sampler_seed, args.random_trials)

        reseed(study, args.sampler_seed, args.random_trials)
        with logging_redirect_tqdm(), bar, without_warnings():
            study.optimize(
                lambda trial: self.try_trial(trial, workbench, bar),
                n_trials=args.n_trials - done,
                callbacks=[end_trial],
                gc_after_trial=True,  # models refer to themselves, and memory is short
            )

    def try_trial(self, trial: optuna.Trial, workbench: Workbench, bar: tqdm) -> float:
        """
        Run a trial, which may fail.

        Returns:
            The result that trials are compared by; NaN for a trial that failed.
        """
        reason = ""
        try:
            settings = draw_settings(self.space, self.settings, trial)
            logger.info("Trial %d: %s", trial.number, describe_values(trial, self.names))
            arguments = self.parse(settings, trial.number)
            metrics = run_trial(workbench, arguments, trial, self.search_args.metric, bar)
            value = compute_objective(metrics, self.search_args.metric)
        except UserError as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            # accelerate knows how each device words a lack of memory; any other error ends the search.
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            reason = "out of memory"
        finally:
            if not self.search_args.keep_checkpoints:
                shutil.rmtree(self.folder_of(trial.number), ignore_errors=True)
        if reason:  # out here, where no error holds on to memory any more
            release_memory()
            trial.set_user_attr(REASON, reason)
            return math.nan  # which Optuna takes for failed and goes on, where an exception would end the search
        for name, score in select_scores(metrics).items():
            trial.set_user_attr(name, score)
        return value

    def describe_end(self, study: optuna.Study, trial: FrozenTrial) -> str:
        """Return how a trial ended, for the log."""
        if trial.state == TrialState.FAIL:
            return f"failed: {trial.user_attrs[REASON]}"
        result = f"{self.metric} {trial.value:.4f}"  # of a pruned trial the last that it reported, by Optuna
        if trial.state == TrialState.PRUNED:
            return f"ended early at step {trial.last_step}, {result}"
        return result + (", the best so far" if study.best_trial.number == trial.number else "")

    def folder_of(self, number: int) -> Path:
        """Return the folder of a trial, where its checkpoints are."""
        return self.folder / _TRIALS / str(number)

    def parse(self, settings: Settings, number: int = 0) -> TrainArguments:
        """Return the arguments of a trial with these settings, resolved."""
        arguments = parse_trial(settings, self.folder_of(number), self.search_args.keep_checkpoints)
        return resolve_trial(arguments, self.config)

    def describe(self) -> dict[str, Any]:
        """Return all that must stay the same for a search to be continued in its folder."""
        own = ("metric", "random_trials", "stop_early", "sampler_seed")
        described: dict[str, Any] = {f"--{name}": getattr(self.search_args, name) for name in own}
        fixed = {name: words for name, words in self.settings.items() if name not in self.names}
        described |= {f"--{name}": " ".join(words) for name, words in fixed.items() if not may_change(name)}
        described |= {f"{parameter.name} in the space": parameter.describe() for parameter in self.space}
        data_args = self.arguments.data
        files = {"train": data_args.train_file} | validation_files(data_args.validation_file)
        # By their content, as a file may have been replaced under its name; Hub data sets are known by name alone.
        there = {name: file for name, file in files.items() if file and Path(file).is_file()}
        return described | {f"{name} rows of sha256": digest_file(file) for name, file in there.items()}

    def report(self, study: optuna.Study) -> FrozenTrial | None:
        """Write the files, print the table, and return the best trial."""
        if not counted_trials(study):
            return None
        table = tabulate_trials(study)
        write_atomically(self.folder / CSV_NAME, table.to_csv(index=False))
        ranked = rank_trials(table, minimize=self.search_args.direction == "minimize")
        title = f"{len(ranked)} trial{'s' if len(ranked) > 1 else ''}, the best first"
        print_section(title, format_trials(ranked, self.metric, self.names))
        best = find_best(study, ranked)
        if best:
            files = [self.folder / CSV_NAME, *self.draw(study)]
            print_section("The best", f"  {self.write_best(best)}\nMore: {', '.join(map(str, files))}")
        return best

    def draw(self, study: optuna.Study) -> list[Path]:
        """Draw the plots, and return their files; a failure must not cost the search its results."""
        try:
            return plot_search(study, self.metric, self.folder)
        except (OSError, ImportError) as error:
            logger.warning("The trials could not be drawn (%s).", error)
            return []

    def write_best(self, best: FrozenTrial) -> str:
        """Write the configuration of the best trial, and return the lines that tell of it."""
        device = "cpu" if self.arguments.training.device.type == "cpu" else "single_gpu"
        command = f"accelerate launch --quiet --config_file accelerate_configs/{device}.yaml "
        command += f"glm_peft/train.py {self.folder / BEST_NAME}"
        # A FixedTrial suggests the values that it is given: the settings come about as they did in the trial.
        settings = draw_settings(self.space, self.settings, FixedTrial(best.params))
        write_best(self.folder, best, self.metric, settings, command)
        found = f"trial {best.number}, {self.metric} {best.value:.4f}: {describe_values(best, self.names)}"
        return f"{found}\nTrain it with\n  {command}"


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
