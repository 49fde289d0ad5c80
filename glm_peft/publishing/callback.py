"""
Send what a training run saves to the Hub, beside the training: it never waits for the network, nor fails by it.

What is to be sent is first put into the queue of the output folder; a thread sends from there. What is left when the
run ends, or when it is killed, is sent by the next run there, or by `python -m glm_peft.push --queued`.
"""

import atexit
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from glm_peft.arguments.methods import FULL
from glm_peft.errors import UserError
from glm_peft.hub.errors import Unsent
from glm_peft.hub.push_queue import Entry, PushQueue, how_to_send
from glm_peft.hub.rights import check_name, check_rights
from glm_peft.hub.upload import Target, send, with_retries
from glm_peft.publishing.files import CONFIG_NAME, WEIGHTS_NAME, collect_files, describe_commit, settle_base_id

logger = logging.getLogger(__name__)

_TRIES_BEFORE_TRAINING = 2
_PAUSE = 120.0  # seconds until what waits is tried again, where nothing new comes
_LONGEST_END = 60.0  # seconds that a run waits for its last push
_LAST_CHECKPOINT = "last-checkpoint"


def prepare_push(model_args: Any, training_args: Any) -> "HubPush":
    """
    What sends the adapter while it is trained; it does nothing where `--push_to_hub` is not given.

    To be called before anything that takes long, in every process; the first one alone asks the Hub.

    Raises:
        UserError: it is known now that the adapter cannot be sent.
    """
    if not training_args.sends_to_hub:
        return HubPush(None, "", training_args)
    _check_flags(model_args, training_args)
    base = settle_base_id(model_args.model_name_or_path, training_args.base_model_id)
    repo_id = training_args.hub_model_id
    if PartialState().is_main_process:
        try:
            repo_id = with_retries(lambda: check_rights(repo_id, "--hub_model_id"), tries=_TRIES_BEFORE_TRAINING)
        except Unsent as unsent:
            logger.warning(
                "It is not known whether %s can be written to (%s): training goes on, and what cannot be sent waits "
                "in %s.",
                repo_id,
                unsent,
                training_args.output_dir,
            )
    target = Target(repo_id, training_args.hub_private_repo, training_args.hub_revision)
    return HubPush(target, base, training_args)


class HubPush(TrainerCallback):
    """
    Sends every checkpoint's adapter, or only the last one's, as `--hub_strategy` says; the end's in any case.

    Args:
        target: where to; `None` for nowhere.
        base: the Hub id of the base.
        training_args: `output_dir` and `hub_strategy`.
    """

    def __init__(self, target: Target | None, base: str, training_args: Any) -> None:
        self.target, self.base, self.args = target, base, training_args
        self.strategy = getattr(training_args.hub_strategy, "value", training_args.hub_strategy)
        is_sender = target is not None and PartialState().is_main_process
        self.sender = Sender(PushQueue(training_args.output_dir)) if is_sender else None
        self.last_checkpoint: Entry | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a checkpoint was written: its adapter is kept as it is, for the thread to send."""
        if self.sender and self.strategy != "end":
            folder = Path(self.args.output_dir) / f"checkpoint-{state.global_step}"
            former = self.last_checkpoint
            self.last_checkpoint = self._keep(folder, f"Step {state.global_step} of an adapter")
            if self.strategy == "checkpoint" and former and self.last_checkpoint:
                former.remove()  # if it waits still: the newer one has everything of it

    def finish(self) -> None:
        """After training, with the results there: send the adapter, waiting for a bounded time."""
        if self.sender:
            self._keep(Path(self.args.output_dir), "Adapter")
            self.sender.close(_LONGEST_END)

    def _keep(self, folder: Path, what: str) -> Entry | None:
        try:
            files = collect_files(folder, self.base, self.target.repo_id)
            if self.strategy == "checkpoint" and folder != Path(self.args.output_dir):
                files |= {f"{_LAST_CHECKPOINT}/{name}": files[name] for name in (CONFIG_NAME, WEIGHTS_NAME)}
            return self.sender.add(files, self.target, describe_commit(folder, self.base, what))
        except Exception as error:  # whatever it is, the training is worth more
            logger.warning("%s cannot be prepared for the Hub (%s: %s).", folder, type(error).__name__, error)
            return None


class Sender:
    """
    A thread that sends what is in a queue; it begins with what an earlier run left there.

    Args:
        attempt: sends the files of an entry once.
    """

    def __init__(self, queue: PushQueue, attempt: Callable[..., str] = send) -> None:
        self.queue, self.attempt = queue, attempt
        self.is_refused, self.is_unreachable = False, False
        self._news, self._closing, self._end = threading.Event(), threading.Event(), threading.Event()
        self._is_told = False
        atexit.register(self._tell)  # also where the run ends early
        self._thread = threading.Thread(target=self._run, name="push to the Hub", daemon=True)
        self._thread.start()

    def add(self, files: dict[str, bytes], target: Target, title: str) -> Entry:
        """Put files into the queue, and wake the thread."""
        entry = self.queue.add(files, target, title)
        self._news.set()
        return entry

    def close(self, seconds: float) -> None:
        """Let the thread come to its end, for so long at most, and tell what waits."""
        self._closing.set()
        self._news.set()
        self._thread.join(seconds)
        self._end.set()
        self.queue.tidy()
        self._tell()

    def _tell(self) -> None:
        left = 0 if self._is_told else len(self.queue.entries())
        self._is_told = True
        if left:
            place = self.queue.folder.parent
            logger.warning(
                "%d push(es) to the Hub could not be sent and wait in %s: %s sends them.",
                left,
                place,
                how_to_send(place),
            )

    def _run(self) -> None:
        self._news.set()
        while not self.is_refused:
            self._news.wait(_PAUSE)
            is_last = self._closing.is_set()
            self._news.clear()
            self._send_waiting()
            if is_last:
                return

    def _send_waiting(self) -> None:
        try:
            for entry in self.queue.entries():
                with suppress(FileNotFoundError):  # a newer one has taken its place
                    logger.info("Sent to the Hub: %s", self._send(entry, entry.read_files(must_exist=True)))
        except Unsent as unsent:
            logger.warning("The push to the Hub did not work (%s): it waits, and the run goes on.", unsent)
        except UserError as error:
            self.is_refused = True
            logger.warning("%s", error)
        except Exception as error:  # a thread's end would not be seen
            logger.warning("The push to the Hub did not work (%s: %s).", type(error).__name__, error)

    def _send(self, entry: Entry, files: dict[str, bytes]) -> str:
        def attempt() -> str:
            try:
                return self.attempt(files, entry.target, entry.title)
            except Unsent as unsent:
                self.is_unreachable = unsent.is_unreachable
                raise

        address = with_retries(attempt, self._pause)
        entry.remove()
        return address

    def _pause(self, seconds: float) -> bool:
        """Wait between two attempts; True where there is to be no other."""
        if not self._closing.is_set():
            self._closing.wait(seconds)  # at the end there is one more attempt, at once
            return False
        return self.is_unreachable or self._end.wait(seconds)


def _check_flags(model_args: Any, training_args: Any) -> None:
    repo_id, strategy = training_args.hub_model_id, training_args.hub_strategy
    if not training_args.do_train:
        raise UserError("--push_to_hub sends what is trained: give --do_train too, or use python -m glm_peft.push.")
    if model_args.peft_type == FULL:
        raise UserError("--push_to_hub sends adapters, and --peft_type none makes none: leave one of the two out.")
    if getattr(strategy, "value", strategy) == "all_checkpoints":
        raise UserError(
            "--hub_strategy all_checkpoints would send the optimizer's state, which is of no use to others: give "
            "every_save, checkpoint or end."
        )
    if not repo_id:
        raise UserError("--push_to_hub needs a name: give --hub_model_id USER/NAME.")
    check_name(repo_id, "--hub_model_id")
