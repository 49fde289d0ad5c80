"""
Predict with a base model, alone or with an adapter: a whole file, or one prompt.

    python -m glm_peft.predict --model_name_or_path BASE --adapter_name_or_path ADAPTER --test_file F --output_dir O
    python -m glm_peft.predict --model_name_or_path BASE --adapter_name_or_path ADAPTER --prompt "…"

The first writes `generated_predictions.jsonl` and `predict_results.json`, and goes on with a stopped run where
`--resume` is given; the second prints the answer.
"""

import json
import logging
import time
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.adapters import load_adapter
from glm_peft.arguments import DataArguments, ModelArguments
from glm_peft.base_model import check_pair, load_base_model, load_config, load_tokenizer
from glm_peft.chat_formats import ChatFormat, get_chat_format
from glm_peft.conversations import load_splits
from glm_peft.data import GenerationFeatures, build_generation_features, describe_example
from glm_peft.errors import exit_with_user_errors
from glm_peft.generation import AnsweredBatch, generate_answers
from glm_peft.generation_settings import GenerationSettings
from glm_peft.predict_arguments import parse_predict_arguments
from glm_peft.prediction_files import (
    PREDICTIONS_NAME,
    PartialPredictions,
    check_resumable,
    make_output_dir,
    write_atomically,
    write_predictions,
)
from glm_peft.reporting import format_results, set_up_logging
from glm_peft.run_description import describe_run

RESULTS_NAME = "predict_results.json"

logger = logging.getLogger("glm_peft.predict")


@exit_with_user_errors()
def main() -> None:
    """Does what the arguments ask for."""
    model_args, data_args, predict_args = parse_predict_arguments()
    settings = GenerationSettings.from_arguments(predict_args, data_args)
    set_up_logging()
    if predict_args.prompt is None:
        make_output_dir(predict_args.output_dir)
        check_resumable(predict_args.output_dir, predict_args.resume)

    # Tokenizer and prompts
    tokenizer = load_tokenizer(model_args)
    check_pair(tokenizer, load_config(model_args))
    chat_format = get_chat_format(tokenizer, model_args.chat_format)

    # One prompt
    if predict_args.prompt is not None:
        prompt = encode_prompt(predict_args.prompt, chat_format, tokenizer, data_args)
        answering = (load_model(model_args), tokenizer, chat_format)
        print(generate_answers(*answering, {"input_ids": [prompt]}, settings)[0])
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
        speed = generate_into(partial, answering, features, settings)

        # Files and scores
        folder = Path(predict_args.output_dir)
        answers = [partial.answers[row] for row in range(len(features.prompts))]
        write_predictions(folder / PREDICTIONS_NAME, features.prompts, features.references, answers)
        results = score(features, answers, chat_format, data_args) | speed
        write_atomically(folder / RESULTS_NAME, json.dumps(results, indent=4) + "\n")
        partial.remove()
    logger.info("%s", format_results(results))
    logger.info("Predictions: %s, scores: %s", folder / PREDICTIONS_NAME, folder / RESULTS_NAME)


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
    model = load_base_model(model_args)
    logger.info("Base %s on %s, %s; adapter %s", model_args.model_name_or_path, model.device, model.dtype, adapter)
    return load_adapter(model, adapter) if adapter else model


def log_settings(settings: GenerationSettings, features: GenerationFeatures, partial: PartialPredictions) -> None:
    """What is left to do, and how it will be done."""
    logger.info("%d rows, %d of them answered before; %s", len(features.prompts), len(partial.answers), settings)


def generate_into(
    partial: PartialPredictions,
    answering: tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, ChatFormat],
    features: GenerationFeatures,
    settings: GenerationSettings,
) -> dict[str, float]:
    """Generate the answers that are missing, and return how fast that was; rows of a stopped run do not count."""
    resumed = len(partial.answers)
    num_tokens = 0

    def keep(batch: AnsweredBatch) -> None:
        nonlocal num_tokens
        partial.add(batch.rows, batch.answers)
        num_tokens += sum(batch.num_tokens)

    start = time.perf_counter()
    generate_answers(*answering, features, settings, on_batch=keep, known_answers=dict(partial.answers))
    seconds = time.perf_counter() - start
    return {
        "predict_samples": len(features.prompts),
        "predict_resumed_samples": resumed,
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round((len(features.prompts) - resumed) / seconds, 3),
        "predict_tokens_per_second": round(num_tokens / seconds, 3),
    }


def score(
    features: GenerationFeatures, answers: list[str], chat_format: ChatFormat, data_args: DataArguments
) -> dict[str, float]:
    """The scores of the rows that have a reference; the libraries for them are loaded only if there are any."""
    if all(reference is None for reference in features.references):
        return {}
    from glm_peft.evaluation import choose_protocol, score_answers

    scores = score_answers(features.references, answers, choose_protocol(chat_format, data_args.metric_protocol))
    return {f"predict_{name}": value for name, value in scores.items()}


if __name__ == "__main__":
    main()
