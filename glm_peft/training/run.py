"""A training run in its output folder: where it starts, what it is recorded as, and its three tasks."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from glm_peft.adapters.base_checks import check_weights, read_origin
from glm_peft.adapters.trained_state import save_adapter
from glm_peft.arguments.training import TrainArguments
from glm_peft.data import GenerationFeatures
from glm_peft.prediction.evaluation import Scoring
from glm_peft.prediction.prediction_files import keep_predictions
from glm_peft.prediction.run_description import describe_run
from glm_peft.preprocessing.conversations import Split
from glm_peft.provenance.ownership import claim_folder, state_origin
from glm_peft.provenance.record import describe_data, describe_origin
from glm_peft.provenance.stretches import RunRecord, check_same_rows
from glm_peft.reporting.file_names import RESULTS_NAME
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.results import save_results
from glm_peft.training.checkpoints import choose_checkpoint
from glm_peft.training.run_log import check_former_run
from glm_peft.training.trainer import PrefixTrainer


class TrainingRun:
    """
    A run in its output folder: the checkpoint that it goes on from, and whose its results are.

    Args:
        arguments: resolved.

    Raises:
        UserError: the checkpoint is not complete, or the folder is of other weights than those that answer.
    """

    def __init__(self, arguments: TrainArguments) -> None:
        self.arguments = arguments
        model_args, _, training_args = arguments
        self.output_dir = make_output_dir(training_args.output_dir)
        self.checkpoint = choose_checkpoint(training_args.resume_from_checkpoint, self.output_dir)
        self.weights: str | None = None  # the digest of those that answer, once they are known
        self.data: dict[str, Any] = {}
        self.record: RunRecord | None = None
        if training_args.do_train:
            check_former_run(self.output_dir, self.checkpoint, model_args.peft_type)
        else:
            self.checkpoint, self.weights = None, claim_folder(self.output_dir, model_args)

    def take_rows(self, splits: Mapping[str, Split]) -> None:
        """Note which rows the run has; a `UserError` where its checkpoint was trained on others."""
        self.data = describe_data(self.arguments.data, splits)
        check_same_rows(self.checkpoint, self.data)

    def check_weights(self, model: PreTrainedModel | PeftModel) -> None:
        """Raise a `UserError` where the checkpoint was trained on another base."""
        if self.checkpoint:
            check_weights(read_origin(self.checkpoint), model, self.arguments.model.allow_other_base)

    def begin_record(self, scoring: Scoring, splits: Mapping[str, Split], **more: Any) -> RunRecord:
        """Begin the record of the run, with `more` facts, in which its steps and seconds are noted later."""
        answering = scoring.answering
        facts = describe_origin(
            answering.model,
            answering.tokenizer,
            answering.chat_format,
            scoring.protocol,
            splits,
            self.data,
            self.arguments,
        )
        facts |= more if facts else {}  # empty in processes other than the main one
        self.record = RunRecord(facts, self.checkpoint, self.arguments.model.adapter_name_or_path)
        return self.record

    def train(self, trainer: PrefixTrainer, scoring: Scoring) -> dict[str, float]:
        """Train, and save the adapter with its record."""
        results = trainer.train(resume_from_checkpoint=self.checkpoint).metrics
        self.save(scoring)
        self.write_record(trainer, results)
        return results

    def save(self, scoring: Scoring) -> None:
        """Save the adapter as it is."""
        answering = scoring.answering
        tokenizer = answering.tokenizer if self.arguments.model.keeps_tokenizer else None
        self.weights = save_adapter(answering.model, self.output_dir, tokenizer)

    def predict(self, scoring: Scoring, prompts: GenerationFeatures) -> dict[str, float | str]:
        """Answer and score the rows of the test file."""
        description = describe_run(self.arguments.model, prompts, scoring.settings, scoring.answering.model)
        with keep_predictions(self.output_dir, description) as kept:
            return scoring.predict(prompts, self.output_dir, kept, state_origin(self.weights, self.data, "test"))

    def write_record(self, trainer: PrefixTrainer, results: Mapping[str, Any]) -> None:
        """Write what is known of the run beside its adapter."""
        self.record.write(self.output_dir, trainer.state.global_step, self.weights, results)

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Write all results, with the weights and rows that they are of."""
        save_results(results, self.output_dir / RESULTS_NAME, state_origin(self.weights, self.data, "validation"))
