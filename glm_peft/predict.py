"""
Predict with a base model, alone or with an adapter: a whole file, or one prompt.

    python -m glm_peft.predict --model_name_or_path BASE --adapter_name_or_path ADAPTER --test_file F --output_dir O
    python -m glm_peft.predict --model_name_or_path BASE --adapter_name_or_path ADAPTER --prompt "…"

The first writes `generated_predictions.jsonl` and `predict_results.json`, and goes on with a stopped run where
`--resume` is given; the second prints the answer. `accelerate launch … -m glm_peft.predict` shares a file's rows among
several processes.
"""

import logging

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.adapters.base_checks import check_tokenizer
from glm_peft.adapters.loading import load_adapter, settle_adapter
from glm_peft.arguments.prediction import parse_predict_arguments
from glm_peft.arguments.training import DataArguments, ModelArguments
from glm_peft.data import GenerationFeatures, build_generation_features, describe_example
from glm_peft.models.chat_formats import ChatFormat, get_chat_format
from glm_peft.models.loading import check_pair, load_base_model, load_config, load_tokenizer
from glm_peft.models.quantization import allow_packing
from glm_peft.prediction.evaluation import choose_protocol, predict
from glm_peft.prediction.generation import generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import PartialPredictions, check_resumable
from glm_peft.prediction.run_description import describe_run, describe_settings
from glm_peft.preprocessing.conversations import load_splits
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import describe_device, describe_precision, format_results

logger = logging.getLogger("glm_peft.predict")


@exit_with_user_errors()
def main() -> None:
    """Does what the arguments ask for."""
    model_args, data_args, predict_args = parse_predict_arguments()
    settings = GenerationSettings.from_arguments(predict_args, data_args)
    processes = join_processes()
    set_up_logging(is_main_process=processes.is_main_process)
    settle_adapter(model_args, is_trainable=False)
    if predict_args.prompt is None:
        make_output_dir(predict_args.output_dir)
        check_resumable(predict_args.output_dir, predict_args.resume)

    # Tokenizer and prompts
    tokenizer = load_tokenizer(model_args)
    check_pair(tokenizer, load_config(model_args))
    check_tokenizer(model_args.adapter_name_or_path, tokenizer)
    chat_format = get_chat_format(tokenizer, model_args.chat_format)

    # One prompt
    if predict_args.prompt is not None:
        prompt = encode_prompt(predict_args.prompt, chat_format, tokenizer, data_args)
        answering = (load_model(model_args), tokenizer, chat_format)
        (answer,) = generate_answers(*answering, {"input_ids": [prompt]}, settings)
        if processes.is_main_process:
            print(answer)
        return

    # Data
    split = load_splits(data_args, ["test"])["test"]
    features = build_generation_features(split, chat_format, tokenizer, data_args)
    logger.info("%s", features.report)
    logger.info("The first prompt\n%s", describe_example(tokenizer, features.dataset[0]))

    # Answers, each batch on the disk as soon as it is there
    run = describe_run(model_args, features, settings)
    with PartialPredictions(predict_args.output_dir, run, predict_args.resume) as partial:
        answering = (load_model(model_args), tokenizer, chat_format)
        log_settings(settings, features, partial)
        protocol = choose_protocol(chat_format, data_args.metric_protocol)
        results = predict(answering, features, settings, protocol, predict_args.output_dir, partial)
        partial.remove()
    logger.info("%s", format_results(results))
    logger.info("Predictions and scores: %s", predict_args.output_dir)


def encode_prompt(
    prompt: str, chat_format: ChatFormat, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments
) -> list[int]:
    """The ids of one question, as a row of a file with that question would have them."""
    messages = [{"role": "user", "content": (data_args.source_prefix or "") + prompt}]
    encoded = chat_format.encode_prompt(tokenizer, messages, data_args.max_source_length)
    if encoded.truncated:
        logger.warning("The end of --prompt is cut off to fit --max_source_length %d.", data_args.max_source_length)
    return encoded.ids


def load_model(model_args: ModelArguments) -> PreTrainedModel | PeftModel:
    """The base, with the adapter where there is one."""
    adapter = model_args.adapter_name_or_path
    model = load_base_model(model_args, PartialState().device)
    allow_packing(model)
    place = f"{describe_device(model.device)}, {describe_precision(model.dtype, model_args.quantization_bit)}"
    logger.info("Base %s on %s; adapter %s", model_args.model_name_or_path, place, adapter or "none, the base alone")
    return load_adapter(model, adapter, allow_other_base=model_args.allow_other_base) if adapter else model


def log_settings(settings: GenerationSettings, features: GenerationFeatures, partial: PartialPredictions) -> None:
    """What is left to do, and how it will be done."""
    done = f", {len(partial.answers)} of them answered before" if partial.answers else ""
    logger.info("%d rows%s; %s", len(features.prompts), done, describe_settings(settings))


def join_processes() -> PartialState:
    """This process's place among those that a launcher started; on CPUs where there is no GPU, or none is wanted."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())


if __name__ == "__main__":
    main()
