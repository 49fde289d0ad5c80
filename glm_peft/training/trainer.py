"""
Extend `Seq2SeqTrainer` by what transformers cannot do with a prefix on a frozen base.

- Batches: transformers has no packing, and draws another order of grouped examples after a resume.
- Scores: its generation on decoder-only models scores the prompt with the answer and needs labels beside prompts.
- Checkpoints: of a projected prefix PEFT saves only the result, from which training cannot go on. The Trainer writes
  them in place, where a kill leaves a part, and keeps neither the order of examples nor the losses not logged yet.
- A loss that is not finite, Ctrl-C, SIGTERM: see `glm_peft.training.watch`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from glm_peft.adapters.assembly import attach_for_training
from glm_peft.adapters.label_loss import has_label_loss
from glm_peft.adapters.trained_state import gather_trained, load_trained_state, save_trained_state, save_weights
from glm_peft.arguments.splits import VALIDATION, split_of
from glm_peft.arguments.training import TrainingArguments
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.batching import GROUPING, Batching, LengthGroupedSampler, row_sizes
from glm_peft.preprocessing.label_weights import split_labels
from glm_peft.preprocessing.streaming import StreamedExamples
from glm_peft.provenance.stretches import RunRecord
from glm_peft.training.checkpoint_writer import CheckpointWriter
from glm_peft.training.interruptions import Interruption, StoppedAtOnce
from glm_peft.training.joined_sets import JoinedSets, Scorer, check_best_metric
from glm_peft.training.keeping import Keeping
from glm_peft.training.kept_log import KeptLog
from glm_peft.training.parallel.last_step import LastStep
from glm_peft.training.parallel.sharded_optimizer import load_sharded
from glm_peft.training.parallel.sharing import count_own, own_labels, own_rows
from glm_peft.training.preference import Preference, count_pairs_once
from glm_peft.training.resumption import Resumption, check_learning_rate
from glm_peft.training.watch import EarlyStopping, EndAfterSignal, Watch
from glm_peft.training.weighted_labels import check_weights, count_by_weight


class PrefixTrainer(Seq2SeqTrainer):
    """
    Train a prefix, or another adapter, on a frozen base.

    Args:
        model: what training needs is attached to it where it is a plain model of PEFT's.
        args: `glm_peft.TrainingArguments`.
        batching: examples, order and collator of training; `None` for those of `Seq2SeqTrainer`. Evaluation has
            padded batches, as the Trainer weighs each batch's loss by its rows.
        score_answers: generates answers and returns their scores, which are logged with the loss of every evaluation;
            a mapping has one for each split, such as `validation_easy`.
        record: of the run, which is written into every checkpoint; `None` for none.
        joins_sets: whether several datasets for evaluation are parts of one, whose loss and scores are told, too.
        keeping: what `--keep_file` measures and `--keep_weight` holds on to; `None` for nothing.
        learns_pairs: whether examples are pairs of answers, of which the first is to be preferred.
        more: `Seq2SeqTrainer`'s own, such as the collator.

    Raises:
        UserError: `args` are transformers' own, which lack settings of this trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        *more: Any,
        batching: Batching | None = None,
        score_answers: Scorer | Mapping[str, Scorer] | None = None,
        record: RunRecord | None = None,
        joins_sets: bool = False,
        keeping: Keeping | None = None,
        learns_pairs: bool = False,
        **kwargs: Any,
    ) -> None:
        if batching:
            kwargs["train_dataset"] = batching.examples
        if not isinstance(args, TrainingArguments):
            raise UserError("PrefixTrainer's args are transformers' own: give it glm_peft.TrainingArguments.")
        if batching and isinstance(batching.examples, StreamedExamples):
            # Else one process reads and sends to the others what accelerate can only do with rows of equal length.
            args.accelerator_config.dispatch_batches = False
        if isinstance(model, PeftModel) and not has_label_loss(model.get_base_model()):
            attach_for_training(model, args)
        super().__init__(model, args, *more, **kwargs)
        self._weighs_labels = check_weights(self)
        self.batching, self.last_step, self.record = batching, None, record
        if batching:
            self.args.train_sampling_strategy = batching.order
        self.score_answers = score_answers if isinstance(score_answers, Mapping) else {VALIDATION: score_answers}
        is_divided = joins_sets and isinstance(self.eval_dataset, dict)
        self.joined_sets = JoinedSets(self.score_answers) if is_divided else None
        self.keeping, self._kept_step = keeping, -1
        self.preference = Preference(self.own_model, self.accelerator, args.dpo_beta) if learns_pairs else None
        # label_loss smooths; the Trainer's smoother would not shift the labels of a model with a prefix.
        self.label_smoother = None
        self.interruption = Interruption(self.args.world_size > 1, self.is_world_process_zero())
        self.resumption = Resumption(self)
        self.checkpoints = CheckpointWriter(self, self.resumption)
        self.watch = Watch(self, self.interruption)
        patience = self.args.early_stopping_patience
        if patience:
            self.add_callback(EarlyStopping(patience, self.args.early_stopping_threshold))
        self.add_callback(self.watch)
        self.add_callback(self.resumption)
        if keeping:
            self.add_callback(KeptLog(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """
        Train; Ctrl-C and SIGTERM end it after the step, with a checkpoint.

        Raises:
            SystemExit: with 130 or 143, after such a signal.
            UserError: a loss is not finite, or a checkpoint cannot be read or written.
        """
        self.resumption.begin(resume_from_checkpoint)
        # Added last: other callbacks have pushed the checkpoint to the Hub by the time that this one ends the run.
        self.add_callback(EndAfterSignal(self, self.interruption, self.checkpoints))
        with self.interruption, self._noise_on_embeddings():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        # Where no step was left, the time of this command is none of the training.
        untold = ("_runtime", "_per_second") if self.resumption.is_over else ()
        told = {name: value for name, value in output.metrics.items() if not name.endswith(untold)}
        return output._replace(metrics=told)

    @contextmanager
    def _noise_on_embeddings(self) -> Iterator[None]:
        """Add NEFTune's noise, of `--neftune_noise_alpha`, to the embeddings within this context."""
        base, alpha = base_of(self.model), self.args.neftune_noise_alpha
        # The Trainer would look for them in `base_model.model`, which ChatGLM-6B does not have.
        self.neftune_noise_alpha = None
        handle = None if alpha is None else activate_neftune(base, alpha)
        try:
            yield
        finally:
            if handle:
                deactivate_neftune(base, handle)

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training, with the collator of its batches."""
        # Evaluation has another collator, and the Trainer has but one attribute for both.
        collator = self.data_collator
        if self.batching:
            self.data_collator = self.batching.collator
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        self.last_step, self._kept_step = LastStep(loader), -1  # a training that begins anew
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]:
        """Return the batches of a step and their number of labels, without the examples that pad the last batch."""
        # Where the evaluation that a resumed run begins with stops it early, the Trainer would still take a step.
        if self.control.should_training_stop:
            return [], None
        try:
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        except UserError as error:  # about a row that is streamed
            if self.args.save_strategy != "no" and self.state.global_step not in (0, self.checkpoints.saved_step):
                self.checkpoints.write()
            # torch puts a traceback before an error of a worker of the loader.
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        # The number divides the loss, so it is counted again without them, or as that of the pairs.
        if self.last_step.take_out_repeated(batches) or self.preference:
            counted = [count_pairs_once(batch) for batch in batches] if self.preference else batches
            count = self._get_num_items_in_batch(counted, device)
        if self._weighs_labels and count is not None:
            count = count_by_weight(self, batches, count)
        return batches, count

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """
        Return the sampler of the order that was planned.

        Overridden for the order by length: the Trainer removes the column of lengths before it needs it, so it reads
        every example, and it draws another order when an epoch is begun again.
        """
        columns = getattr(self.train_dataset, "column_names", None) or []
        if self.args.train_sampling_strategy != GROUPING or "length" not in columns:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = self.train_dataset["length"][:]
        return LengthGroupedSampler(lengths, row_sizes(self.args)[1], seed, lambda: int(self.state.epoch or 0))

    # Steps

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss [] of a batch, whose gradients are computed."""
        loss = super().training_step(*args, **kwargs)
        self.watch.note(loss)
        if self.preference:
            self.preference.count_last()
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss [] of a batch, with the gradient of the second loss once in a step that has one."""
        if (self._weighs_labels or self.preference) and not model.training:
            # The Trainer counts labels; the mean is over the sum of the batch's weights, or over its pairs.
            num_items_in_batch = None
        with self.preference.as_loss(inputs) if self.preference else nullcontext(inputs) as batch:
            loss = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        args, step = self.args, self.state.global_step
        is_due = args.keep_weight and model.training and step % args.keep_every == 0 and step != self._kept_step
        if self.keeping is None or not is_due:
            return loss
        self._kept_step = step
        rows = self.state.train_batch_size or args.train_batch_size  # fewer where memory was not enough for these
        batch = self.keeping.draw_batch(step // args.keep_every, rows, args.seed)
        kept = args.keep_weight * args.keep_every * self.keeping.divergence(model, batch)
        if not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            kept = kept * self.current_gradient_accumulation_steps  # by which the Trainer then divides
        return loss + kept - kept.detach()  # so that the loss that is logged stays that of the rows

    def measure_kept(self) -> dict[str, float]:
        """Return what `--keep_file` measures, named as an evaluation names it."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return {f"eval_{name}": value for name, value in self.keeping.measure().items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean loss over all steps, those before a resume included."""
        # The Trainer divides by the steps since the resume, but its sum was restored for all.
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if self.preference and "loss" in logs:
            logs |= self.preference.take(is_training=True)
        given = dict(logs)
        super().log(logs, *args, **kwargs)
        logs.update(given)  # the callback that prints the log removes the number of floating-point operations

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """
        Return loss and scores; a signal in training stops the evaluation, with which a resumed run then begins.

        Raises:
            UserError: `metric_for_best_model` is none of them.
        """
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        except StoppedAtOnce:
            self.checkpoints.write()
            self.callback_handler.on_save(self.args, self.state, self.control)  # ends the run
            raise
        if self.is_in_train and metric_key_prefix == "eval":  # of all datasets together, where there are several
            check_best_metric(self.args.metric_for_best_model, metrics)
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Return the loss and the scores of generated answers, so that callbacks see both."""
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer's keeps rows that pad a batch
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # Sampled answers must not change the dropout of the steps that follow.
        with self.interruption.stops_at_once() if self.is_in_train else nullcontext(), torch.random.fork_rng(devices):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            score_answers = self.score_answers.get(split_of(metric_key_prefix))
            rewards = self.preference.take(is_training=False) if self.preference else {}
            scores = rewards | (score_answers() if score_answers else {})
            # Once, where there are several data sets.
            sets = [f"eval_{name}" for name in self.eval_dataset] if isinstance(self.eval_dataset, dict) else ["eval"]
            if self.keeping and metric_key_prefix == sets[0]:
                output.metrics.update(self.measure_kept())
            if self.joined_sets and metric_key_prefix in sets:
                means = {"loss": output.metrics[f"{metric_key_prefix}_loss"]} | rewards
                self.joined_sets.add(metric_key_prefix, output.num_samples, means)
                output.metrics.update(self.joined_sets.score() if metric_key_prefix == sets[-1] else {})
        output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Return loss [], logits [b, s, vocabulary] and labels [b, s]; the loss alone if that is asked for.

        `Seq2SeqTrainer` would generate after the answer; answers come from `glm_peft.prediction.generation`.
        """
        labels, loss = inputs.get("labels"), None
        if labels is not None:
            # Neither rows that pad a batch nor the labels of other processes may weigh in the loss.
            with own_labels(self.args):
                loss = Trainer.prediction_step(self, model, own_rows(inputs), True)[0]
        if self.preference and count_own(inputs):
            self.preference.count_last()
        if prediction_loss_only or self.preference:
            return loss, None, None
        # A call with labels returns no logits (see label_loss), so they take a call of their own.
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        tokens = None if labels is None else split_labels(labels)[0]
        return loss, Trainer.prediction_step(self, model, unlabelled, False, ignore_keys)[1], tokens

    # Checkpoints

    @property
    def own_model(self) -> torch.nn.Module:
        """Return the model without the wrapper of a backend."""
        return self.accelerator.unwrap_model(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the gathered trained parameters, under every backend."""
        # In all processes, though one writes. The Trainer would gather the base, too, and fail with a sharded prefix.
        trained = gather_trained(self.own_model)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_weights(self.own_model, trained, partial(self._save, folder))
            save_trained_state(self.own_model, trained, folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """
        Write a checkpoint that is complete or does not exist.

        Overridden, as the Trainer writes it in place, where a kill leaves a part, and leaves out the random state that
        the epoch began with.
        """
        self.checkpoints.write()

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """
        Return how many epochs a resumed run has finished, and how many batches of the next one.

        Overridden, as the Trainer takes one more step where training was over.
        """
        start = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, *args)
        if isinstance(self.train_dataset, StreamedExamples):
            self.train_dataset.skipped = start[1] * self.last_step.loader.batch_size * self.args.world_size
        return (num_train_epochs, 0) if self.resumption.was_over(max_steps) else start

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """
        Set the trained parameters to those of a checkpoint.

        Overridden, as PEFT keeps of a projected prefix only the result, and refuses virtual tokens to train.
        """
        load_trained_state(self.own_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Set the trained parameters to the best ones. Overridden for the reason of `_load_from_checkpoint`."""
        load_trained_state(self.own_model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """
        Set optimizer and schedule to those of a checkpoint.

        Overridden for FSDP2, whose checkpoints here have the files of one process, so that any number can resume.
        """
        if checkpoint:
            check_learning_rate(Path(checkpoint), self.args.learning_rate)
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_sharded(self, Path(checkpoint))
