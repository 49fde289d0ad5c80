"""Set up the log of a command on stderr."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a help text and a misspelt flag are to be answered before seconds of imports
    from transformers import TrainingArguments


def set_up_logging(level: int | None = None, is_main_process: bool = True) -> None:
    """
    Set up the log on stderr.

    Args:
        level: the lowest level that is shown. `None`: info of this package and warnings of libraries; in processes
            other than the main one only errors.
        is_main_process: whether this process shows progress bars.
    """
    import transformers

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    usual = (logging.INFO, logging.WARNING) if is_main_process else (logging.ERROR, logging.ERROR)
    own, of_libraries = usual if level is None else (level, level)
    # The root logger stays at warnings, for all libraries but transformers, which has a switch of its own.
    logging.getLogger("glm_peft").setLevel(own)
    transformers.utils.logging.set_verbosity(of_libraries)
    if not is_main_process:
        transformers.utils.logging.disable_progress_bar()


def choose_level(training_args: "TrainingArguments") -> int | None:
    """Return the level of `--log_level`, in processes that do not log of `--log_level_replica`; `None` for passive."""
    from transformers.training_args import trainer_log_levels

    name = training_args.log_level if training_args.should_log else training_args.log_level_replica
    return None if name == "passive" else trainer_log_levels[name]
