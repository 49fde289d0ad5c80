"""
Search for good settings: train with many, compare them, and write the best as a configuration of training.

    python -m glm_peft.search configs/demo.yaml --space configs/search_space.yaml --n_trials 20 --output_dir O

The same command again goes on where it was stopped, up to `--n_trials` in all.
"""

import sys
from importlib.util import find_spec

import datasets

from glm_peft.arguments.search import parse_search_arguments
from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.log import set_up_logging


@exit_with_user_errors()
def main(argv: list[str] | None = None) -> None:
    """Run the trials that are left, and report on all of them."""
    # Optuna is an extra of the package, which only a search needs.
    if find_spec("optuna") is None:
        raise UserError(
            "A search needs the package optuna, which is not installed: `pip install -e '.[search]'` installs it."
        )
    search_args, settings = parse_search_arguments(argv)
    set_up_logging()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # each of their moves would be a line of a log file
    from glm_peft.trials.search import Search  # which imports Optuna

    Search(search_args, settings).run()


if __name__ == "__main__":
    main()
