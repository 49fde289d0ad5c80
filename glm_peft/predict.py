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

from glm_peft.adapters.assembly import OpenedBase, open_base, put_adapter_on
from glm_peft.arguments.prediction import parse_predict_arguments
from glm_peft.data import GenerationFeatures, build_generation_features
from glm_peft.models.layerwise_casting import kept_dtype
from glm_peft.models.loading import check_base_weights
from glm_peft.models.quantization import allow_packing
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import PartialPredictions, check_resumable
from glm_peft.prediction.run_description import describe_run, describe_settings
from glm_peft.preprocessing.example_description import describe_example
from glm_peft.preprocessing.prompt_shape import shape_prompt
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.ownership import claim_folder, state_origin
from glm_peft.provenance.record import describe_data
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import new_output_dir
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import describe_device, describe_precision, format_results

logger = logging.getLogger("glm_peft.predict")


@exit_with_user_errors()
def main() -> None:
    """Answer the rows of a file or one prompt, as the arguments ask."""
    model_args, data_args, predict_args = parse_predict_arguments()
    GenerationSettings.from_arguments(predict_args, data_args)  # told before anything is read, if they are wrong
    processes = join_processes()
    set_up_logging(is_main_process=processes.is_main_process)
    if predict_args.prompt is not None:
        base = open_base(model_args, data_args)
    else:
        with new_output_dir(predict_args.output_dir):
            check_resumable(predict_args.output_dir, predict_args.resume)
            base = open_base(model_args, data_args)
            weights = claim_folder(predict_args.output_dir, base.model_args)
    check_base_weights(base.model_args)
    data_args = base.data_args
    settings = GenerationSettings.from_arguments(predict_args, data_args)

    # One prompt
    if predict_args.prompt is not None:
        features = {"input_ids": [encode_prompt(predict_args.prompt, base)]}
        (answer,) = load_answering(base).generate(features, settings)
        if processes.is_main_process:
            print(answer)
        return

    # Data
    split = load_splits(data_args, ["test"])["test"]
    features = build_generation_features(split, base.chat_format, base.tokenizer, data_args)
    logger.info("%s", features.report)
    logger.info("The first prompt\n%s", describe_example(base.tokenizer, features.dataset[0]))

    # Answers, each batch on the disk as soon as it is there
    run = describe_run(base.model_args, features, settings)
    origin = state_origin(weights, describe_data(data_args, {"test": split}), "test")
    with PartialPredictions(predict_args.output_dir, run, predict_args.resume) as partial:
        scoring = Scoring.from_arguments(load_answering(base), predict_args, data_args)
        log_settings(settings, features, partial)
        results = scoring.predict(features, predict_args.output_dir, partial, origin)
        partial.remove()
    logger.info("%s", format_results(results))
    logger.info("Predictions and scores: %s", predict_args.output_dir)


def encode_prompt(prompt: str, base: OpenedBase) -> list[int]:
    """Encode one question as a row of a file with that question would be."""
    messages, length = [{"role": "user", "content": prompt}], base.data_args.max_source_length
    messages = shape_prompt(messages, base.data_args)
    encoded = base.chat_format.encode_prompt(base.tokenizer, messages, length)
    if encoded.truncated:
        logger.warning("The end of --prompt is cut off to fit --max_source_length %d.", length)
    return encoded.ids


def load_answering(base: OpenedBase) -> Answering:
    """Load the base, with the adapter where there is one."""
    model, args = base.load_model(PartialState().device), base.model_args
    allow_packing(model)
    precision = describe_precision(model.dtype, kept_dtype(model), args.quantization_bit)
    place = f"{describe_device(model.device)}, {precision}"
    adapter = args.adapter_name_or_path or "none, the base alone"
    logger.info("Base %s on %s; adapter %s", args.model_name_or_path, place, adapter)
    return Answering(put_adapter_on(model, base), base.tokenizer, base.chat_format)


def log_settings(settings: GenerationSettings, features: GenerationFeatures, partial: PartialPredictions) -> None:
    """Log how many rows are left to answer, and how they are generated."""
    done = f", {len(partial.answers)} of them answered before" if partial.answers else ""
    logger.info("%d rows%s; %s", len(features.prompts), done, describe_settings(settings))


def join_processes() -> PartialState:
    """Join the processes that a launcher started, on CPUs where no GPU is there or wanted, and return the state."""
    # Given outright, as accelerate reads the variable only where it makes an Accelerator, and prediction makes none.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())


if __name__ == "__main__":
    main()
