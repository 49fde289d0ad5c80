"""Write the checkpoints of a training run, each in a temporary folder that is moved to its place when complete."""

from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from glm_peft.adapters.trained_state import tidy_weights
from glm_peft.provenance.record import write_provenance
from glm_peft.training.checkpoints import UNFINISHED, explain_failed_writing, publish_checkpoint, rotate_checkpoints
from glm_peft.training.parallel.backends import backend_name
from glm_peft.training.parallel.sharded_optimizer import save_gathered
from glm_peft.training.resumption import Resumption


class CheckpointWriter:
    """
    Write complete checkpoints, in every process.

    Args:
        trainer: whose model, optimizer, random state and losses are written.
        resumption: writes what the Trainer does not restore by itself.
    """

    def __init__(self, trainer: Trainer, resumption: Resumption) -> None:
        self.trainer, self.resumption = trainer, resumption
        self.saved_step = -1

    def write(self) -> None:
        """
        Write `checkpoint-N` for the step that was just made, and remove those beyond the limit.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        output_dir = Path(trainer.args.output_dir)
        folder = output_dir / UNFINISHED / f"checkpoint-{step}"
        with explain_failed_writing(f"The checkpoint of step {step}", output_dir):
            trainer.store_flos()
            trainer.save_model(str(folder), _internal_call=True)
            if not trainer.args.save_only_model:
                self._save_position(folder)
            self._find_best(output_dir)
            # Before the record is made: it lists the files of every process.
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                self._publish(folder)
        # No process goes on, or ends after a signal, before the checkpoint is in its place.
        trainer.accelerator.wait_for_everyone()
        self.saved_step = step

    def _save_position(self, folder: Path) -> None:
        """Write optimizer, schedule, scaler, random state and position, from which training resumes."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled:
            save_gathered(trainer, folder)
        else:
            trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))  # makes the folder on machines that write no model
        self.resumption.save(folder)

    def _find_best(self, output_dir: Path) -> None:
        """Set the path of the best checkpoint in the state of the trainer."""
        state = self.trainer.state
        best = output_dir / f"checkpoint-{state.best_global_step}"
        # It may be the one that is being written, which is not in its place yet.
        if state.best_global_step == state.global_step or self.resumption.is_of_run(best):
            state.best_model_checkpoint = str(best)

    def _publish(self, folder: Path) -> None:
        args, state = self.trainer.args, self.trainer.state
        callbacks = [*self.trainer.callback_handler.callbacks, self.trainer.control]
        # Built anew: the Trainer's own code looks each callback up in the former states, where a new one is missing.
        exported = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        state.stateful_callbacks = TrainerState(stateful_callbacks=exported).stateful_callbacks
        state.save_to_json(str(folder / TRAINER_STATE_NAME))
        tidy_weights(folder)
        if self.trainer.record:  # another training may start from a checkpoint, or this one go on from it
            write_provenance(folder, self.trainer.record.up_to(state.global_step))
        facts = {"processes": args.world_size, "engine": backend_name(args), "started_at": self.resumption.started_at}
        publish_checkpoint(folder, not args.save_only_model, **facts)
        rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)
