"""
Train a P-Tuning v2 prefix, evaluate it and predict with it, from the command line.

    accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml \\
        glm_peft/train.py configs/adgen_chatglm.yaml

Flags may follow the file and win over it.
"""

import logging

import transformers

from glm_peft.adapters.assembly import open_base, put_trainable_adapter_on
from glm_peft.adapters.base_checks import check_weights, read_origin
from glm_peft.adapters.trained_state import save_adapter
from glm_peft.arguments.splits import evaluation_sets
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import encode_splits
from glm_peft.models.loading import check_base_weights
from glm_peft.prediction.evaluation import Answering, choose_protocol, make_scorers, predict
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import keep_predictions
from glm_peft.prediction.run_description import describe_run
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.conversations import load_splits
from glm_peft.provenance.ownership import claim_folder, state_origin
from glm_peft.provenance.record import describe_data, describe_origin
from glm_peft.provenance.stretches import RunRecord, check_same_rows
from glm_peft.publishing.callback import prepare_push
from glm_peft.publishing.card.build import write_card
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.file_names import RESULTS_NAME
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.log import choose_level, set_up_logging
from glm_peft.reporting.results import format_results, save_results
from glm_peft.training.checkpoints import choose_checkpoint, explain_failed_writing
from glm_peft.training.curves import TrainingCurves
from glm_peft.training.parallel.backends import resolve_backend
from glm_peft.training.run_log import check_former_run, log_data, log_run
from glm_peft.training.trainer import PrefixTrainer

logger = logging.getLogger("glm_peft.train")


@exit_with_user_errors()
def main() -> None:
    """Train, evaluate and predict as the arguments ask."""
    # Arguments, decided before any weight is loaded
    arguments = parse_train_arguments()
    set_up_logging(choose_level(arguments.training), is_main_process=arguments.training.process_index == 0)
    transformers.set_seed(arguments.training.seed)
    output_dir = make_output_dir(arguments.training.output_dir)
    base = open_base(arguments.model, arguments.data, is_trainable=True)
    arguments = arguments.resolve(base.model_args, base.data_args)
    model_args, data_args, training_args = arguments
    check_base_weights(model_args)
    pusher = prepare_push(model_args, training_args)
    checkpoint = choose_checkpoint(training_args.resume_from_checkpoint, output_dir)
    if training_args.do_train:
        check_former_run(output_dir, checkpoint, model_args.peft_type)
    else:
        checkpoint, weights = None, claim_folder(output_dir, model_args)
    loading_device = resolve_backend(model_args, training_args)

    # Data
    splits = load_splits(data_args, training_args.wanted_splits)
    described = describe_data(data_args, splits)
    check_same_rows(checkpoint, described)
    encoding = (base.chat_format, base.tokenizer, data_args)
    data = encode_splits(splits, *encoding, with_prompts=training_args.predict_with_generate)
    collator, batching = TrainingCollator(base.tokenizer, data_args.ignore_pad_token_for_loss), None
    if training_args.do_train:
        batching = plan_batching(data.examples["train"], collator, base.config, arguments)
    log_data(data, base.tokenizer, batching)

    # Model
    model = base.load_model(loading_device, runs_on=training_args.device)
    model = put_trainable_adapter_on(model, base, training_args)
    if checkpoint:
        check_weights(read_origin(checkpoint), model, model_args.allow_other_base)
    log_run(model, arguments, data.reports, batching)

    # Trainer
    answering = Answering(model, base.tokenizer, base.chat_format)
    settings = GenerationSettings.from_arguments(training_args, data_args)
    protocol = choose_protocol(base.chat_format, data_args.metric_protocol)
    facts = describe_origin(answering.model, base.tokenizer, base.chat_format, protocol, splits, described, arguments)
    record = RunRecord(facts, checkpoint, model_args.adapter_name_or_path)
    trainer = PrefixTrainer(
        model,
        training_args,
        data_collator=collator,
        batching=batching,
        eval_dataset=evaluation_sets(data.examples),
        score_answers=make_scorers(answering, data.prompts, settings, protocol),
        record=record,
    )
    for callback in (TrainingCurves(output_dir, protocol), pusher):
        trainer.add_callback(callback)

    # Train, evaluate, predict
    results: dict[str, float] = {}
    with explain_failed_writing("The result", output_dir):
        if training_args.do_train:
            results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
            weights = save_adapter(model, output_dir, base.tokenizer if model_args.keeps_tokenizer else None)
            record.write(output_dir, trainer.state.global_step, weights, results)
        if training_args.do_eval:
            results |= trainer.evaluate()
        if training_args.do_predict:
            run = describe_run(model_args, data.prompts["test"], settings, model)
            with keep_predictions(output_dir, run) as kept:
                origin = state_origin(weights, described, "test")
                results |= predict(answering, data.prompts["test"], settings, protocol, output_dir, kept, origin)
        save_results(results, output_dir / RESULTS_NAME, state_origin(weights, described, "validation"))

        # Adapter out
        if training_args.do_train:
            record.write(output_dir, trainer.state.global_step, weights, results)
            write_card(output_dir)
    logger.info("%s\nresults: %s", format_results(results), output_dir)
    if training_args.do_train:
        pusher.finish()  # last: where the adapter cannot be sent, the last line is the command that sends it


if __name__ == "__main__":
    main()
