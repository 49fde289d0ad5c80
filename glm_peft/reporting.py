"""What a run tells: the log, and the table of results at its end."""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from peft import PeftModel
from transformers import TrainingArguments

from glm_peft.prediction_files import write_atomically

RESULTS_NAME = "all_results.json"

logger = logging.getLogger(__name__)


def set_up_logging(level: int = logging.INFO, is_main_process: bool = True) -> None:
    """The log of this package on stderr, from one process; libraries speak from warnings on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("glm_peft").setLevel(level if is_main_process else logging.ERROR)
    transformers.utils.logging.set_verbosity_warning()
    if not is_main_process:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def log_run(model: PeftModel, model_args: Any, training_args: TrainingArguments) -> None:
    """Device, precision, world size, base, adapter."""
    trainable, total = model.get_nb_trainable_parameters()
    config = model.active_peft_config
    bits = f", quantized to {model_args.quantization_bit} bits" if model_args.quantization_bit else ""
    size = config.num_virtual_tokens * config.num_layers * 2 * config.token_dim
    lines = [
        f"base: {model_args.model_name_or_path} ({model.config.model_type}, {model.dtype}{bits})",
        f"device: {training_args.device}, {training_args.world_size} process(es)",
        f"adapter: {config.num_virtual_tokens} virtual tokens{', projected' if config.prefix_projection else ''}; "
        f"{size:,} numbers in float32, {4 * size / 2**20:.2f} MiB",
        f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.4f} %)",
        f"results: {training_args.output_dir}",
    ]
    logger.info("The run\n  %s", "\n  ".join(lines))


def format_results(results: dict[str, float]) -> str:
    """The results as a table, one line each."""
    width = max(map(len, results), default=0)
    lines = [f"  {name:<{width}}  {_format(value):>14}" for name, value in results.items()]
    return "\n".join(["Results", *lines])


def save_results(results: dict[str, float], output_dir: str) -> None:
    """Write `all_results.json`, in the main process."""
    if PartialState().is_main_process:
        write_atomically(Path(output_dir) / RESULTS_NAME, json.dumps(results, indent=4) + "\n")


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value}"
