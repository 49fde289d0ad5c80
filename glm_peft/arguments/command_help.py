"""
Answer `--help` and a wrong flag of each command before anything is imported that takes seconds.

`python -m glm_peft.predict --help` imports this package first, and with it torch and the models. So the package asks
here, first of all, whether the process is one of its own commands, with `--help` or with flags that are wrong by
themselves; a program that imports it never is.
"""

import logging
import sys
from pathlib import Path

from glm_peft.arguments.transformers_flags import MOST_USED
from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors

_PACKAGE = Path(__file__).absolute().parents[1]
COMMANDS = (
    "chat",
    "convert",
    "distil",
    "doctor",
    "inspect_adapter",
    "predict",
    "push",
    "recipes",
    "search",
    "serve",
    "train",
    "web",
)


def answer_early() -> None:
    """In a command of this package print the help and exit with 0, or what is wrong with its flags and exit with 2."""
    # `sys.orig_argv`, as `sys.argv` begins with a bare "-m" while the interpreter still looks for the module.
    command, words = _command(sys.orig_argv)
    if command is None:
        return
    if {"-h", "--help"} & set(words):
        with exit_with_user_errors():
            _show_help(command)
        sys.exit(0)
    logging.disable()  # what is told without an error is told when the command itself parses its flags
    try:
        _read(command, words)
    except UserError:
        logging.disable(logging.NOTSET)
        with exit_with_user_errors():
            _read(command, words)
    finally:
        logging.disable(logging.NOTSET)


def _command(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the command that an interpreter's words start as a module, a script or by glm-peft, and its own words."""
    for place, word in enumerate(words[:-1]):
        if Path(word).stem == "glm-peft" or words[place - 1 : place + 1] == ["-m", _PACKAGE.name]:
            return words[place + 1] if words[place + 1] in COMMANDS else None, words[place + 2 :]
    if "-m" in words:
        place = words.index("-m") + 1
        package, _, name = "".join(words[place : place + 1]).partition(".")
        return name if package == _PACKAGE.name and name in COMMANDS else None, words[place + 1 :]
    scripts = {_PACKAGE / f"{name}.py": name for name in COMMANDS}
    paths = [Path(word).absolute() for word in words]
    place = next((place for place, path in enumerate(paths) if place and path in scripts), None)
    return (None, []) if place is None else (scripts[paths[place]], words[place + 1 :])


def _read(command: str, words: list[str]) -> None:
    """Parse the words of a command as far as this can be done without transformers, which raises what is wrong."""
    if command == "chat":
        from glm_peft.arguments.chat import parse_chat_arguments as parse
    elif command == "convert":
        from glm_peft.arguments.conversion import parse_convert_arguments as parse
    elif command == "inspect_adapter":
        from glm_peft.arguments.inspection import parse_inspect_arguments as parse
    elif command == "predict":
        from glm_peft.arguments.prediction import parse_predict_arguments as parse
    elif command == "push":
        from glm_peft.arguments.push import parse_push_arguments as parse
    elif command == "recipes":
        from glm_peft.arguments.recipes import parse_recipes_arguments as parse
    elif command == "serve":
        from glm_peft.arguments.serve import parse_serve_arguments as parse
    elif command == "web":
        from glm_peft.arguments.web import parse_web_arguments as parse
    else:
        _read_training(command, words)
        return
    parse(words)


def _read_training(command: str, words: list[str]) -> None:
    from glm_peft.arguments.distil import read_distil_arguments
    from glm_peft.arguments.doctor import read_doctor_arguments
    from glm_peft.arguments.search import read_search_arguments
    from glm_peft.arguments.training_defaults import (
        DistillationDefaults,
        ExaminedDefaults,
        TrainingDefaults,
        read_train_arguments,
    )
    from glm_peft.arguments.transformers_source import trainer_flags

    read, defaults = {
        "distil": (read_distil_arguments, DistillationDefaults),
        "doctor": (read_doctor_arguments, ExaminedDefaults),
        "search": (read_search_arguments, TrainingDefaults),
        "train": (read_train_arguments, TrainingDefaults),
    }[command]
    read(words, trainer_flags(defaults))


def _show_help(command: str) -> None:
    if command not in ("distil", "doctor", "search", "train"):
        _read(command, ["--help"])  # which prints it and exits
    from glm_peft.arguments.command_line import parse_command
    from glm_peft.arguments.data import DataArguments
    from glm_peft.arguments.distil import DISTIL_WORDS, DistilArguments
    from glm_peft.arguments.doctor import DOCTOR_WORDS
    from glm_peft.arguments.model import ModelArguments
    from glm_peft.arguments.search import SEARCH_WORDS, SearchArguments
    from glm_peft.arguments.training_defaults import TRAINING_WORDS, TrainingDefaults

    words = {"train": TRAINING_WORDS, "doctor": DOCTOR_WORDS, "search": SEARCH_WORDS, "distil": DISTIL_WORDS}[command]
    words = words | {"epilog": "\n".join([_transformers_flags(), words.get("epilog", "")])}
    first = {"search": (SearchArguments,), "distil": (DistilArguments,)}.get(command, ())
    # Without transformers' hundred arguments of its Trainer: --help_all has them.
    parse_command(["--help"], (*first, ModelArguments, DataArguments, TrainingDefaults), **words)


def _transformers_flags() -> str:
    groups = [f"- {name}: --{flags.replace(' ', ' --')}" for name, flags in MOST_USED.items()]
    return "\n".join(["Of transformers' own flags these are used most; --help_all explains every flag.", *groups])
