"""
Train a P-Tuning v2 prefix, evaluate it and predict with it, from the command line.

    accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml \\
        glm_peft/train.py configs/adgen_chatglm.yaml

Flags may follow the file and win over it.
"""

import logging
from dataclasses import replace

from glm_peft.adapters.assembly import open_base, put_trainable_adapter_on
from glm_peft.arguments.data import DPO
from glm_peft.arguments.splits import evaluation_sets
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import encode_splits, stream_examples
from glm_peft.models.loading import check_base_weights
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.preprocessing.batching import plan_batching, row_sizes
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.publishing.callback import prepare_push
from glm_peft.publishing.card.build import write_card
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.log import choose_level, set_up_logging
from glm_peft.reporting.results import format_results
from glm_peft.training.checkpoints import explain_failed_writing
from glm_peft.training.curves import TrainingCurves
from glm_peft.training.keeping import read_general_prompts
from glm_peft.training.kept_log import begin_keeping, kept_results
from glm_peft.training.parallel.backends import resolve_backend
from glm_peft.training.run import TrainingRun
from glm_peft.training.run_log import log_data, log_run
from glm_peft.training.trainer import PrefixTrainer

logger = logging.getLogger("glm_peft.train")


@exit_with_user_errors()
def main() -> None:
    """Train, evaluate and predict as the arguments ask."""
    from transformers import set_seed  # above, a script would import it before a wrong flag is told

    # Arguments, decided before any weight is loaded
    arguments = parse_train_arguments()
    set_up_logging(choose_level(arguments.training), is_main_process=arguments.training.process_index == 0)
    set_seed(arguments.training.seed)
    base = open_base(arguments.model, arguments.data, is_trainable=True)
    arguments = arguments.resolve(base.model_args, base.data_args)
    model_args, data_args, training_args = arguments
    check_base_weights(model_args)
    pusher = prepare_push(model_args, training_args)
    run = TrainingRun(arguments)
    loading_device = resolve_backend(model_args, training_args)

    # Data
    splits = load_splits(data_args, training_args.wanted_splits)
    run.take_rows(splits)
    data = encode_splits(splits, base.chat_format, base.tokenizer, data_args, training_args.predict_with_generate)
    collator = TrainingCollator(base.tokenizer, data_args.ignore_pad_token_for_loss)
    batching = plan_batching(data.examples["train"], collator, base.config, arguments) if "train" in splits else None
    log_data(data, base.tokenizer, batching)
    general_prompts = read_general_prompts(base, training_args.keep_file, training_args.max_keep_samples)

    # Model
    model = base.load_model(loading_device, runs_on=training_args.device)
    model = put_trainable_adapter_on(model, base, training_args)
    run.check_weights(model)
    log_run(model, arguments, data.reports, batching)

    # Trainer
    scoring = Scoring.from_arguments(Answering(model, base.tokenizer, base.chat_format), training_args, data_args)
    keeping = begin_keeping(general_prompts, scoring.answering, run.output_dir, arguments, batching)
    if data_args.streaming and batching:  # until here of the first rows alone
        block, _ = row_sizes(training_args)
        stream = stream_examples(splits["train"], base.chat_format, base.tokenizer, base.config, data_args, block)
        batching = replace(batching, examples=stream)
    trainer = PrefixTrainer(
        model,
        training_args,
        data_collator=collator,
        batching=batching,
        eval_dataset=evaluation_sets(data.examples),
        score_answers=scoring.make_scorers(data.prompts),
        joins_sets=data_args.validation_split is not None,
        record=run.begin_record(scoring, splits),
        keeping=keeping,
        learns_pairs=data_args.objective == DPO,
    )
    trainer.add_callback(TrainingCurves(run.output_dir, scoring.protocol))
    trainer.add_callback(pusher)

    # Train, evaluate, predict
    results: dict[str, float] = {}
    with explain_failed_writing("The result", run.output_dir):
        if training_args.do_train:
            results |= run.train(trainer, scoring)
        if training_args.do_eval:
            results |= trainer.evaluate()
        results = kept_results(trainer.state.log_history) | results
        if training_args.do_predict:
            results |= run.predict(scoring, data.prompts["test"])
        run.save_results(results)

        # Adapter out
        if training_args.do_train:
            run.write_record(trainer, results)
            write_card(run.output_dir)
    logger.info("%s\nresults: %s", format_results(results), run.output_dir)
    if training_args.do_train:
        pusher.finish()  # last: where the adapter cannot be sent, the last line is the command that sends it


if __name__ == "__main__":
    main()
