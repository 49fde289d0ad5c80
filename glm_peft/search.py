"""
Search for good settings: train with many, compare them, and write the best as a configuration of training.

    python -m glm_peft.search configs/demo.yaml --space configs/search_space.yaml --n_trials 20 --output_dir O

The same command again goes on where it was stopped, up to `--n_trials` in all.
"""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import datasets
from tqdm.contrib.logging import logging_redirect_tqdm

from glm_peft.arguments.search import SearchArguments, Settings, parse_search_arguments
from glm_peft.arguments.splits import validation_files
from glm_peft.arguments.training import TrainArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import load_config
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import digest_file, make_output_dir
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import print_section
from glm_peft.trials.plot import PLOT_NAME, plot_search
from glm_peft.trials.report import (
    BEST_NAME,
    CSV_NAME,
    STOPPED,
    TrialRecord,
    describe_values,
    find_best,
    format_trials,
    rank_trials,
    record_trial,
    write_best,
    write_trials,
)
from glm_peft.trials.space import check_space, draw_settings
from glm_peft.trials.space_file import read_space
from glm_peft.trials.trial import (
    SearchTrainer,
    TrialFailed,
    Workbench,
    compute_objective,
    parse_trial,
    settle_trial,
)

if TYPE_CHECKING:  # it may not be installed
    import optuna

    from glm_peft.trials.progress import SearchProgress

logger = logging.getLogger("glm_peft.search")

_TRIALS = "trials"
# What may be other when a search is gone on with.
_FREE = {"output_dir", "disable_tqdm", "do_train", "do_eval", "do_predict", "test_file", "max_predict_samples"}
_FREE |= {"resume_from_checkpoint", "preprocessing_num_workers", "dataloader_num_workers", "overwrite_cache"}
_FREE_BEGIN = ("save_", "log_", "logging_", "report_", "hub_")


class StoppedByTerm(KeyboardInterrupt):
    """SIGTERM came, which ends a search as Ctrl-C does."""


@exit_with_user_errors()
def main(argv: list[str] | None = None) -> None:
    """Runs the trials that are left, and writes what is known of all."""
    if find_spec("optuna") is None:
        raise UserError(
            "A search needs the package optuna, which is not installed: `pip install -e '.[search]'` installs it."
        )
    search_args, settings = parse_search_arguments(argv)
    set_up_logging()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    Search(search_args, settings).run()


class Search:
    """
    A search, from its arguments to its report.

    Args:
        search_args: its own.
        settings: of training, with which every trial begins.

    Raises:
        UserError: the space or the settings are wrong.
    """

    def __init__(self, search_args: SearchArguments, settings: Settings) -> None:
        self.search_args, self.settings = search_args, settings
        self.folder = Path(settings["output_dir"][-1])
        self.metric, self.minimize = f"eval_{search_args.metric}", search_args.direction == "minimize"
        self.space = read_space(search_args.space)
        self.names = [parameter.name for parameter in self.space]
        arguments = parse_trial(settings, self.folder)
        self.config = load_config(arguments.model)
        with without_warnings():  # they were given once
            check_space(self.space, settings, search_args.metric, self.parse)
            self.arguments = settle_trial(arguments, self.config)

    def run(self) -> None:
        """
        Run the trials that are left, and report on all.

        Raises:
            SystemExit: with 130 or 143, after Ctrl-C or SIGTERM.
            UserError: the folder is of another search, or no trial came to its end.
        """
        from glm_peft.trials.study import counted_trials, end_stopped_trials, hold_folder, open_study

        make_output_dir(self.folder)
        with hold_folder(self.folder), sigterm_interrupts():
            study = open_study(self.folder, self.search_args.direction, self.describe())
            done, stop = len(counted_trials(study)), None
            try:
                if done < self.search_args.n_trials:
                    self.run_trials(study, done)
            except KeyboardInterrupt as interruption:
                stop = interruption
            end_stopped_trials(study)
            with suppress(OSError):  # it holds checkpoints that are kept
                (self.folder / _TRIALS).rmdir()
            best = self.report(list(map(record_trial, study.get_trials(deepcopy=False))))
            done = len(counted_trials(study))
        if stop is not None:
            kept = f"{done} of {self.search_args.n_trials} trials are in {self.folder}"
            print(f"stopped: {kept}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + (signal.SIGTERM if isinstance(stop, StoppedByTerm) else signal.SIGINT))
        if best is None:
            raise UserError(
                f"None of {done} trials came to its end, for the reasons above: narrow {self.search_args.space} or "
                "change the settings that all trials share, and give another --output_dir."
            )

    def run_trials(self, study: "optuna.Study", done: int) -> None:
        """Trials up to `--n_trials`, by stock's `hyperparameter_search`."""
        import optuna

        from glm_peft.trials.progress import SearchProgress
        from glm_peft.trials.study import STUDY_NAME, RepeatableSampler, database_url, none_need_complete

        args = self.search_args
        if args.stop_early and self.arguments.training.eval_strategy == "no":
            logger.info("No trial ends early, as none is evaluated on its way: --eval_strategy steps would do that.")
        workbench = Workbench(self.arguments)
        best = find_best(list(map(record_trial, study.get_trials(deepcopy=False))), self.minimize)
        # A trial's own arguments have it true: the bar is that of the search.
        is_shown = self.settings.get("disable_tqdm", ["false"])[-1].lower() != "true"
        progress = SearchProgress(self.metric, self.minimize, best and best.value, (args.n_trials, done), is_shown)
        objective = partial(compute_objective, metric=args.metric)
        trainer = SearchTrainer(
            workbench,
            self.arguments,
            partial(self.begin_trial, progress),
            objective,
            args.keep_checkpoints,
            progress,
        )
        pruner = optuna.pruners.MedianPruner(args.random_trials) if args.stop_early else optuna.pruners.NopPruner()
        with logging_redirect_tqdm(), closing(progress), none_need_complete(study, args.n_trials), without_warnings():
            trainer.hyperparameter_search(
                direction=args.direction,
                backend="optuna",
                n_trials=args.n_trials - done,
                storage=database_url(self.folder),
                study_name=STUDY_NAME,
                load_if_exists=True,
                sampler=RepeatableSampler(args.sampler_seed, args.random_trials, progress.end),
                pruner=pruner,
                catch=(TrialFailed,),
            )

    def begin_trial(self, progress: "SearchProgress", trial: Any) -> TrainArguments:
        """The arguments of an Optuna trial, once its values are drawn and told."""
        settings = draw_settings(self.space, self.settings, lambda parameter: parameter.suggest(trial))
        progress.begin(trial.number, {name: trial.params[name] for name in self.names if name in trial.params})
        return self.parse(settings, trial.number)

    def parse(self, settings: Settings, number: int = 0) -> TrainArguments:
        """The arguments of a trial with these settings, settled."""
        folder = self.folder / _TRIALS / str(number)
        return settle_trial(parse_trial(settings, folder, self.search_args.keep_checkpoints), self.config)

    def describe(self) -> dict[str, Any]:
        """What makes it this search and no other."""
        own = ("metric", "random_trials", "stop_early", "sampler_seed")
        described: dict[str, Any] = {f"--{name}": getattr(self.search_args, name) for name in own}
        fixed = {name: words for name, words in self.settings.items() if name not in {*_FREE, *self.names}}
        described |= {
            f"--{name}": " ".join(words) for name, words in fixed.items() if not name.startswith(_FREE_BEGIN)
        }
        described |= {f"{parameter.name} in the space": parameter.describe() for parameter in self.space}
        data_args = self.arguments.data
        files = {"train": data_args.train_file} | validation_files(data_args.validation_file)
        there = {name: file for name, file in files.items() if file and Path(file).is_file()}
        return described | {f"{name} rows of sha256": digest_file(file) for name, file in there.items()}

    def report(self, records: list[TrialRecord]) -> TrialRecord | None:
        """Write the files, print the table, and return the best trial."""
        best = find_best(records, self.minimize)
        ranked = [record for record in rank_trials(records, self.minimize) if record.state != STOPPED]
        write_trials(self.folder, records, self.metric, self.names)
        if ranked:
            title = f"{len(ranked)} trial{'s' if len(ranked) > 1 else ''}, the best first"
            print_section(title, format_trials(ranked, self.metric, self.names))
        picture = self.draw(records)
        if best:
            files = [self.folder / CSV_NAME, *([picture] if picture else [])]
            print_section("The best", f"  {self.write_best(best)}\nMore: {', '.join(map(str, files))}")
        return best

    def draw(self, records: list[TrialRecord]) -> Path | None:
        """The picture; one that cannot be drawn must not cost the search its results."""
        try:
            return plot_search(records, self.space, self.metric, self.minimize, self.folder / PLOT_NAME)
        except (OSError, ImportError) as error:
            logger.warning("The trials could not be drawn (%s).", error)
            return None

    def write_best(self, best: TrialRecord) -> str:
        """Write the configuration of the best trial; what is said of it."""
        device = "cpu" if self.arguments.training.device.type == "cpu" else "single_gpu"
        command = f"accelerate launch --quiet --config_file accelerate_configs/{device}.yaml "
        command += f"glm_peft/train.py {self.folder / BEST_NAME}"
        settings = draw_settings(self.space, self.settings, lambda parameter: best.values[parameter.name])
        write_best(self.folder, best, self.metric, settings, command)
        values = {name: best.values[name] for name in self.names if name in best.values}
        found = f"trial {best.trial}, {self.metric} {best.value:.4f}: {describe_values(values)}"
        return f"{found}\nTrain it with\n  {command}"


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Around what is to end on SIGTERM as on Ctrl-C; where the signal is ignored, it stays so."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise StoppedByTerm

    former = signal.getsignal(signal.SIGTERM)
    if former != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Around parsing the settings once more: what is to be said of them was said."""
    parser = logging.getLogger("glm_peft.arguments.command_line")
    former = parser.level
    parser.setLevel(logging.ERROR)
    try:
        yield
    finally:
        parser.setLevel(former)


if __name__ == "__main__":
    main()
