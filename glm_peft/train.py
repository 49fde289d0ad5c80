"""
P-Tuning v2 from the command line: train a prefix, evaluate it, predict with it.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml glm_peft/train.py configs/adgen_chatglm.yaml

Flags may follow the file and win over it.
"""

import logging
from functools import partial

import transformers

from glm_peft.adapters import check_adapter, create_adapter
from glm_peft.arguments import parse_train_arguments
from glm_peft.base_model import check_pair, load_base_model, load_config, load_tokenizer
from glm_peft.chat_formats import get_chat_format
from glm_peft.collators import TrainingCollator
from glm_peft.conversations import load_splits
from glm_peft.curves import TrainingCurves
from glm_peft.data import build_generation_features, build_training_features, describe_example
from glm_peft.errors import exit_with_user_errors
from glm_peft.evaluation import choose_protocol, evaluate_answers, predict
from glm_peft.generation_settings import GenerationSettings
from glm_peft.label_loss import attach_label_loss
from glm_peft.packing import PackingCollator, pack_examples
from glm_peft.prediction_files import make_output_dir
from glm_peft.prefix_attention import attach_prefix_attention
from glm_peft.prefix_initialization import initialize_prefix
from glm_peft.publishing import describe_recipe, save_adapter, write_card
from glm_peft.reporting import format_results, log_run, save_results, set_up_logging
from glm_peft.trainer import PrefixTrainer, choose_checkpoint

logger = logging.getLogger("glm_peft.train")


@exit_with_user_errors()
def main() -> None:
    """Runs what the arguments ask for."""
    model_args, data_args, training_args = parse_train_arguments()
    set_up_logging(is_main_process=training_args.process_index == 0)
    transformers.set_seed(training_args.seed)
    make_output_dir(training_args.output_dir)
    if model_args.adapter_name_or_path:
        check_adapter(model_args.adapter_name_or_path)
    checkpoint = choose_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)

    # Tokenizer and prompts
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args)
    check_pair(tokenizer, config)
    chat_format = get_chat_format(tokenizer, model_args.chat_format)

    # Data
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = load_splits(data_args, [name for name, is_wanted in wanted.items() if is_wanted])
    encode = (chat_format, tokenizer, data_args)
    examples = {name: build_training_features(splits[name], *encode) for name in splits if name != "test"}
    datasets = {name: dataset for name, (dataset, _) in examples.items()}
    answered = {"validation": training_args.predict_with_generate, "test": True}
    prompts = {name: build_generation_features(splits[name], *encode) for name in splits if answered.get(name)}
    for name in splits:
        logger.info("%s", examples[name][1] if name in examples else prompts[name].report)
    if "train" in examples:
        logger.info("The first example\n%s", describe_example(tokenizer, datasets["train"][0]))
    if "train" in examples and data_args.packing:
        datasets["train"] = pack_examples(datasets["train"], data_args.max_length, config)
        logger.info("Packed into %d rows of up to %d tokens", len(datasets["train"]), data_args.max_length)

    # Model
    model = create_adapter(load_base_model(model_args, training_args.device), model_args)
    initialize_prefix(model, tokenizer, model_args)
    attach_prefix_attention(model, model_args.prefix_dropout)
    attach_label_loss(model.get_base_model(), training_args.label_smoothing_factor)
    log_run(model, model_args, training_args)

    # Trainer
    settings = GenerationSettings.from_arguments(training_args, data_args)
    answering = (model, tokenizer, chat_format)
    protocol = choose_protocol(chat_format, data_args.metric_protocol)
    scorer = partial(evaluate_answers, answering, prompts.get("validation"), settings, protocol)
    trainer = PrefixTrainer(
        model,
        training_args,
        data_collator=PackingCollator(tokenizer, TrainingCollator(tokenizer, data_args.ignore_pad_token_for_loss)),
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("validation"),
        score_answers=scorer if "validation" in prompts else None,
    )

    trainer.add_callback(TrainingCurves(training_args.output_dir))

    # Train, evaluate, predict
    results: dict[str, float] = {}
    if training_args.do_train:
        results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        save_adapter(model, training_args.output_dir, tokenizer if model_args.save_tokenizer else None)
    if training_args.do_eval:
        results |= trainer.evaluate()
    if training_args.do_predict:
        results |= predict(answering, prompts["test"], settings, protocol, training_args.output_dir)
    save_results(results, training_args.output_dir)
    if training_args.do_train:
        write_card(model, training_args.output_dir, describe_recipe(model_args, data_args, training_args), results)
    logger.info("%s", format_results(results))


if __name__ == "__main__":
    main()
