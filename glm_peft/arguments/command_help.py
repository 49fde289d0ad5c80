"""
Answer `--help` of each command before anything is imported that takes seconds.

`python -m glm_peft.predict --help` imports this package first, and with it torch and the models. So the package asks
here, first of all, whether the process is one of its own commands with `--help`; a program that imports it never is.
"""

import sys
from pathlib import Path

from glm_peft.arguments.transformers_flags import MOST_USED
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


def show_help_if_asked() -> None:
    """Print the help and exit with 0, where this process is a command of this package with `-h` or `--help`."""
    # `sys.orig_argv`, as `sys.argv` begins with a bare "-m" while the interpreter still looks for the module.
    command = _command(sys.orig_argv)
    if command and {"-h", "--help"} & set(sys.argv[1:]):
        with exit_with_user_errors():
            _show_help(command)
        sys.exit(0)


def _command(words: list[str]) -> str | None:
    """Return the command of this package that an interpreter's words start, as a module, a script or by glm-peft."""
    for place, word in enumerate(words[:-1]):
        if Path(word).stem == "glm-peft" or words[place - 1 : place + 1] == ["-m", _PACKAGE.name]:
            return words[place + 1] if words[place + 1] in COMMANDS else None
    if "-m" in words:
        package, _, name = "".join(words[words.index("-m") + 1 :][:1]).partition(".")
        return name if package == _PACKAGE.name and name in COMMANDS else None
    scripts = {_PACKAGE / f"{name}.py": name for name in COMMANDS}
    return next((scripts[path] for path in (Path(word).absolute() for word in words[1:]) if path in scripts), None)


def _show_help(command: str) -> None:  # each parser prints its help and exits
    if command == "convert":
        from glm_peft.arguments.conversion import parse_convert_arguments

        parse_convert_arguments(["--help"])
    if command == "inspect_adapter":
        from glm_peft.arguments.inspection import parse_inspect_arguments

        parse_inspect_arguments(["--help"])
    if command == "push":
        from glm_peft.arguments.push import parse_push_arguments

        parse_push_arguments(["--help"])
    if command == "recipes":
        from glm_peft.arguments.recipes import parse_recipes_arguments

        parse_recipes_arguments(["--help"])
    from glm_peft.arguments.command_line import parse_command
    from glm_peft.arguments.data import DataArguments
    from glm_peft.arguments.distil import DISTIL_WORDS, DistilArguments
    from glm_peft.arguments.doctor import DOCTOR_WORDS
    from glm_peft.arguments.model import ModelArguments
    from glm_peft.arguments.prediction import PREDICTION_TYPES, PREDICTION_WORDS
    from glm_peft.arguments.search import SEARCH_WORDS, SearchArguments
    from glm_peft.arguments.training_defaults import TRAINING_WORDS, TrainingDefaults

    if command == "chat":
        from glm_peft.arguments.chat import CHAT_TYPES, CHAT_WORDS

        parse_command(["--help"], CHAT_TYPES, **CHAT_WORDS)
    if command == "serve":
        from glm_peft.arguments.serve import SERVE_TYPES, SERVE_WORDS

        parse_command(["--help"], SERVE_TYPES, **SERVE_WORDS)
    if command == "web":
        from glm_peft.arguments.web import WEB_TYPES, WEB_WORDS

        parse_command(["--help"], WEB_TYPES, **WEB_WORDS)
    words = {"train": TRAINING_WORDS, "doctor": DOCTOR_WORDS, "search": SEARCH_WORDS, "distil": DISTIL_WORDS}
    words = {**words, "predict": PREDICTION_WORDS}[command]
    if command != "predict":
        words = words | {"epilog": "\n".join([_transformers_flags(), words.get("epilog", "")])}
    # Without transformers' hundred arguments of its Trainer, whose import takes seconds: --help_all has them.
    types = PREDICTION_TYPES if command == "predict" else (ModelArguments, DataArguments, TrainingDefaults)
    first = {"search": SearchArguments, "distil": DistilArguments}
    types = (first[command], *types) if command in first else types
    parse_command(["--help"], types, **words)


def _transformers_flags() -> str:
    groups = [f"- {name}: --{flags.replace(' ', ' --')}" for name, flags in MOST_USED.items()]
    return "\n".join(["Of transformers' own flags these are used most; --help_all explains every flag.", *groups])
