"""
P-Tuning v2 from the command line: train a prefix, evaluate it, predict with it.

    accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml \\
        glm_peft/train.py configs/adgen_chatglm.yaml

Flags may follow the file and win over it.
"""

import logging

import transformers

from glm_peft.adapters.attention_check import check_attention
from glm_peft.adapters.base_checks import check_tokenizer
from glm_peft.adapters.compilation import compile_layers
from glm_peft.adapters.loading import create_adapter, settle_adapter
from glm_peft.adapters.other_methods import attach_loss
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.adapters.prefix_initialization import initialize_prefix
from glm_peft.adapters.trained_state import save_adapter
from glm_peft.arguments.methods import PREFIX_TUNING, keeps_tokenizer, settle_method
from glm_peft.arguments.splits import evaluation_sets
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import build_generation_features, build_training_features, describe_example
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.loading import check_pair, load_base_model, load_config, load_tokenizer
from glm_peft.models.unwrapping import base_of, has_prefix
from glm_peft.prediction.evaluation import choose_protocol, make_scorers, predict
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import keep_predictions
from glm_peft.prediction.run_description import describe_run
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.conversations import load_splits
from glm_peft.provenance.record import ProvenanceWriter, describe_origin, write_provenance
from glm_peft.publishing.callback import prepare_push
from glm_peft.publishing.card.build import write_card
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.log import choose_level, set_up_logging
from glm_peft.reporting.results import format_results, save_results
from glm_peft.training.checkpoints import choose_checkpoint, explain_failed_writing
from glm_peft.training.curves import TrainingCurves
from glm_peft.training.parallel.backends import resolve_backend
from glm_peft.training.run_log import log_run
from glm_peft.training.trainer import PrefixTrainer

logger = logging.getLogger("glm_peft.train")


@exit_with_user_errors()
def main() -> None:
    """Runs what the arguments ask for."""
    model_args, data_args, training_args = parse_train_arguments()
    set_up_logging(choose_level(training_args), is_main_process=training_args.process_index == 0)
    transformers.set_seed(training_args.seed)
    make_output_dir(training_args.output_dir)
    settle_adapter(model_args, is_trainable=True)
    pusher = prepare_push(model_args, training_args)
    checkpoint = choose_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)

    # Tokenizer and prompts
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args)
    check_pair(tokenizer, config)
    settle_method(model_args, data_args, training_args, config.model_type)
    loading_device = resolve_backend(model_args, training_args)
    if model_args.peft_type == PREFIX_TUNING:
        check_attention(config, model_args.attn_implementation)
    check_tokenizer(model_args.adapter_name_or_path, tokenizer)
    chat_format = get_chat_format(tokenizer, model_args.chat_format)

    # Data
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = load_splits(data_args, [name for name, is_wanted in wanted.items() if is_wanted])
    encode = (chat_format, tokenizer, data_args)
    examples = {name: build_training_features(splits[name], *encode) for name in splits if name != "test"}
    datasets = {name: dataset for name, (dataset, _) in examples.items()}
    answered = [name for name in splits if name == "test" or (name != "train" and training_args.predict_with_generate)]
    prompts = {name: build_generation_features(splits[name], *encode) for name in answered}
    reports = {name: examples[name][1] if name in examples else prompts[name].report for name in splits}
    for report in reports.values():
        logger.info("%s", report)
    if "train" in examples:
        logger.info("The first example\n%s", describe_example(tokenizer, datasets["train"][0]))
    collator = TrainingCollator(tokenizer, data_args.ignore_pad_token_for_loss)
    batching = None
    if "train" in examples:
        batching = plan_batching(datasets["train"], collator, config, (model_args, data_args, training_args))
        logger.info("%s", batching.reason)

    # Model
    model = create_adapter(load_base_model(model_args, loading_device), model_args)
    if has_prefix(model):
        initialize_prefix(model, tokenizer, model_args)
        attach_prefix_attention(model, model_args.prefix_dropout)
    attach_loss(model, training_args.label_smoothing_factor)
    compile_layers(base_of(model), training_args)
    log_run(model, (model_args, training_args), reports, batching)

    # Trainer
    settings = GenerationSettings.from_arguments(training_args, data_args)
    answering = (model, tokenizer, chat_format)
    protocol = choose_protocol(chat_format, data_args.metric_protocol)
    trainer = PrefixTrainer(
        model,
        training_args,
        data_collator=collator,
        batching=batching,
        eval_dataset=evaluation_sets(datasets),
        score_answers=make_scorers(answering, prompts, settings, protocol),
    )

    trainer.add_callback(TrainingCurves(training_args.output_dir, protocol))
    origin = describe_origin(answering, protocol, splits, (model_args, data_args, training_args))
    trainer.add_callback(ProvenanceWriter(origin))
    trainer.add_callback(pusher)

    # Train, evaluate, predict
    results: dict[str, float] = {}
    with explain_failed_writing("The result", training_args.output_dir):
        if training_args.do_train:
            results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
            save_adapter(model, training_args.output_dir, tokenizer if keeps_tokenizer(model_args) else None)
            write_provenance(training_args.output_dir, origin, results)
        if training_args.do_eval:
            results |= trainer.evaluate()
        if training_args.do_predict:
            run = describe_run(model_args, prompts["test"], settings, model)
            with keep_predictions(training_args.output_dir, run) as kept:
                results |= predict(answering, prompts["test"], settings, protocol, training_args.output_dir, kept)
        save_results(results, training_args.output_dir)
        if training_args.do_train:
            write_provenance(training_args.output_dir, origin, results)
            write_card(training_args.output_dir)
            pusher.finish()
    logger.info("%s\nresults: %s", format_results(results), training_args.output_dir)


if __name__ == "__main__":
    main()
