"""Send adapters to the Hub from a training run, after training and at each save if asked; a failure stops no run."""

import logging
import shlex
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as StockArguments

from glm_peft.arguments.methods import FULL
from glm_peft.arguments.training import ModelArguments, TrainingArguments
from glm_peft.errors import UserError
from glm_peft.hub.errors import Unsent
from glm_peft.hub.rights import check_name, check_rights
from glm_peft.hub.upload import Target, send, with_retries
from glm_peft.publishing.files import (
    CONFIG_NAME,
    SENT_NAMES,
    WEIGHTS_NAME,
    collect_files,
    describe_commit,
    describe_sending,
    resolve_base_id,
)

logger = logging.getLogger(__name__)

# Few before training, as a network that is down now may be back at the end; many at the end, where nothing waits.
_TRIES_BEFORE_TRAINING = 2
_TRIES_AT_SAVE, _TRIES_AT_END = 3, 6
_LAST_CHECKPOINT = "last-checkpoint"  # transformers' name for it with `--hub_strategy checkpoint`


def prepare_push(model_args: ModelArguments, training_args: TrainingArguments) -> "HubPush":
    """
    Check that the adapter can be sent, and return the callback that sends it; without `--push_to_hub` it does nothing.

    To be called before anything that takes long, in every process.

    Raises:
        UserError: it is known now that the adapter cannot be sent.
    """
    if not training_args.sends_to_hub:
        return HubPush(None, "", training_args)
    _check_flags(model_args, training_args)
    # `Trainer.push_to_hub` finds a base that is a local folder only after training, with the repository created.
    base = resolve_base_id(model_args.model_name_or_path, training_args.base_model_id)
    repo_id = training_args.hub_model_id
    if PartialState().is_main_process:
        try:
            repo_id = with_retries(lambda: check_rights(repo_id, "--hub_model_id"), tries=_TRIES_BEFORE_TRAINING)
        except Unsent as unsent:
            logger.warning(
                "It is not known whether %s can be written to (%s): training goes on.",
                repo_id,
                unsent,
            )
    logger.info("%s", describe_sending(SENT_NAMES, repo_id, training_args.num_card_rows))
    target = Target(repo_id, training_args.hub_private_repo, training_args.hub_revision)
    return HubPush(target, base, training_args)


class HubPush(TrainerCallback):
    """
    Send the adapter after training, and with a `--hub_strategy` other than `end` the one of every checkpoint, too.

    Args:
        target: the branch to send to; `None` to send nothing.
        base: the Hub id of the base.
        training_args: `output_dir` and `hub_strategy`.
    """

    def __init__(self, target: Target | None, base: str, training_args: TrainingArguments) -> None:
        self.target, self.base = target, base
        self.output_dir, self.strategy = Path(training_args.output_dir), training_args.hub_strategy
        self.is_sender = target is not None and PartialState().is_main_process
        self.tries_at_save = _TRIES_AT_SAVE

    def on_save(self, args: StockArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Send the adapter of the checkpoint that was just written."""
        if not self.is_sender or self.strategy == "end":
            return
        folder = self.output_dir / f"checkpoint-{state.global_step}"
        error = self._push(folder, f"Step {state.global_step} of an adapter", self.tries_at_save)
        # Training stands still meanwhile: where the Hub does not answer, each later save costs one attempt.
        self.tries_at_save = 1 if error else _TRIES_AT_SAVE
        if error:
            logger.warning("%s could not be sent to the Hub (%s): training goes on.", folder, error)

    def finish(self) -> None:
        """Send the adapter with its results; where that fails, the last line is the command that sends it."""
        error = self._push(self.output_dir, "Adapter", _TRIES_AT_END) if self.is_sender else None
        if error:
            logger.error(
                "The adapter could not be sent to the Hub (%s) and is in %s; this command sends it:\n%s",
                error,
                self.output_dir,
                _command(self.output_dir, self.target, self.base),
            )

    def _push(self, folder: Path, what: str, tries: int) -> str | None:
        """Send the adapter of a folder, and return why it could not be sent; `None` where it was."""
        try:
            files = collect_files(folder, self.base, self.target.repo_id)
            # The adapter alone: stock sends the optimizer's and the random states as well, of no use to others.
            if self.strategy == "checkpoint" and folder != self.output_dir:
                files |= {f"{_LAST_CHECKPOINT}/{name}": files[name] for name in (CONFIG_NAME, WEIGHTS_NAME)}
            title = describe_commit(folder, self.base, what)
            logger.info("Sent to the Hub: %s", with_retries(lambda: send(files, self.target, title), tries=tries))
        except (Unsent, UserError) as error:
            return str(error).rstrip(".")
        except Exception as error:  # whatever it is, the training is worth more
            return f"{type(error).__name__}: {error}"
        return None


def _command(folder: Path, target: Target, base: str) -> str:
    words = ["python", "-m", "glm_peft.push", str(folder), "--repo_id", target.repo_id, "--base_model_id", base]
    words += ["--revision", target.revision] if target.revision else []
    words += ["--private", str(target.private).lower()] if target.private is not None else []
    return shlex.join(words)


def _check_flags(model_args: ModelArguments, training_args: TrainingArguments) -> None:
    if not training_args.do_train:
        raise UserError("--push_to_hub sends what is trained: give --do_train too, or use python -m glm_peft.push.")
    if model_args.peft_type == FULL:
        raise UserError("--push_to_hub sends adapters, and --peft_type none makes none: leave one of the two out.")
    if training_args.hub_strategy == "all_checkpoints":
        raise UserError(
            "--hub_strategy all_checkpoints would send the optimizer's state, which is of no use to others: give "
            "every_save, checkpoint or end."
        )
    if not training_args.hub_model_id:
        raise UserError("--push_to_hub needs a name: give --hub_model_id USER/NAME.")
    check_name(training_args.hub_model_id, "--hub_model_id")
