"""The commands, in which some processes end on purpose; no test itself."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from glm_peft import predict, train
from glm_peft.errors import UserError
from glm_peft.prediction import prediction_files
from glm_peft.training.trainer import PrefixTrainer

SIGN = "one of the processes ends now"


def main() -> None:
    """`fail_in_one.py COMMAND WAY RANKS [flags]`, where RANKS are those that end, such as 0,1."""
    command, way, ranks = sys.argv[1:4]
    sys.argv[1:4] = []

    def fail() -> None:
        if os.environ["RANK"] in ranks.split(","):
            print(SIGN, file=sys.stderr, flush=True)
            WAYS[way]()

    COMMANDS[command](fail)


def fail_in_training(fail: Callable[[], None], method: str = "training_step") -> None:
    """In a method of the trainer, once three steps are done."""
    whole = getattr(PrefixTrainer, method)

    def failing(trainer: PrefixTrainer, *args: object, **kwargs: object) -> object:
        if trainer.state.global_step == 3:
            fail()
        return whole(trainer, *args, **kwargs)

    setattr(PrefixTrainer, method, failing)
    train.main()


def fail_in_prediction(fail: Callable[[], None], main: Callable[[], None] = predict.main) -> None:
    """After the first batch, once the first process has kept one too."""
    add = prediction_files.PartialPredictions.add

    def failing_add(partial: prediction_files.PartialPredictions, *args: object) -> None:
        add(partial, *args)
        first = Path(partial.path.parent, prediction_files.PARTIAL_NAME)
        while not first.exists() or first.read_bytes().count(b"\n") < 2:
            time.sleep(0.05)
        fail()

    prediction_files.PartialPredictions.add = failing_add
    main()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash() -> None:
    raise ZeroDivisionError("made up")


def _refuse() -> None:
    raise UserError("Row 3 is made up: leave it out.")


COMMANDS = {
    "train": fail_in_training,
    "evaluate": partial(fail_in_training, method="prediction_step"),
    "predict": fail_in_prediction,
    "do_predict": partial(fail_in_prediction, main=train.main),
}
WAYS = {"kill": _kill, "crash": _crash, "refuse": _refuse}

if __name__ == "__main__":
    main()
