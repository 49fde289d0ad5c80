"""
Run a command of this package from any folder: `glm-peft train config.yaml`, or `python -m glm_peft train config.yaml`.

    glm-peft launch --config_file accelerate_configs/multi_gpu.yaml train config.yaml

starts it in several processes, as `accelerate launch` does, but ends at Ctrl-C with the command's own last line.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import FrameType

from glm_peft.arguments.command_help import COMMANDS
from glm_peft.arguments.settings import where_to_look
from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors

_USAGE = f"usage: glm-peft COMMAND [--help] …, where COMMAND is one of {', '.join(COMMANDS)}, launch"


def main() -> None:
    """Run the command that the first word names with the words that follow it."""
    command, *words = sys.argv[1:] or ["--help"]
    with exit_with_user_errors():
        if command in ("-h", "--help"):
            print(_USAGE)
        elif command == "launch":
            launch(words)
        else:
            sys.argv = [f"{sys.argv[0]} {command}", *words]
            importlib.import_module(module_of(command)).main()


def module_of(name: str) -> str:
    """
    Return the name of a command's module.

    Raises:
        UserError: there is no such command.
    """
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"glm-peft has no command {name!r}; {f'the nearest is {near[0]!r}' if near else _USAGE}.")
    return f"glm_peft.{name}"


def launch(words: Sequence[str]) -> None:
    """
    Start a command by accelerate's launcher, and let the command itself act on Ctrl-C.

    Args:
        words: flags of `accelerate launch`, then the command with its own.

    Raises:
        SystemExit: with 130 after Ctrl-C, with that of the process that failed first, or with 1.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(["--quiet", "--module", *words])
    args.training_script = module_of(args.training_script)
    if args.config_file and not Path(args.config_file).is_file():
        raise UserError(f"--config_file {args.config_file}: {where_to_look(Path(args.config_file))}.")
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    # Torchrun's own lines about each process that ends: the processes tell more.
    torchrun = logging.getLogger("torch.distributed.elastic")
    torchrun.addHandler(logging.NullHandler())
    torchrun.propagate = False
    # A handler, not SIG_IGN, which the started processes would inherit: theirs is the last word, and this one waits.
    signal.signal(signal.SIGINT, note)
    try:
        launch_command(args)
    except SignalException as error:  # torchrun's, which has its own handler
        came.append(error.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:
            raise  # a process was killed and could not say why: torchrun's report names the signal
        sys.exit(code)
    except SystemExit:
        if not came:
            raise
    if came:
        sys.exit(128 + came[0])


if __name__ == "__main__":
    main()
