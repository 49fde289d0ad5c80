"""The flags that differ from transformers' training arguments or are added, without their import, which is slow."""

from dataclasses import dataclass
from typing import Any, Literal

from glm_peft.arguments.fields import option
from glm_peft.arguments.former_options import IGNORED
from glm_peft.arguments.generation import GenerationArguments

BUILTIN_PROMPTS = "builtin"
"""The value of `--keep_file` that stands for the prompts of this package."""

TRAINING_WORDS = {
    "usage": "accelerate launch glm_peft/train.py [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "P-Tuning v2 for ChatGLM models. Flags win over the file, whose keys are the flags without --.",
    "epilog": f"Accepted from published scripts, without effect: {', '.join(IGNORED)}.",
}


@dataclass
class TrainingDefaults(GenerationArguments):
    """Flags of the Trainer with defaults for a prefix, and those that only this toolkit has."""

    _argument_group_name = "training, evaluation and generation"

    learning_rate: float | None = option(
        None,
        "Highest learning rate. None: that of --peft_type, such as 5e-3 for a prefix and 2e-4 for LoRA.",
        recipe="always",
    )
    # transformers' 500 would show nothing of a short run.
    logging_steps: float = option(10, "Log every so many steps, or, below 1, after each such share of all steps.")
    # Off, as transformers' default shows a NaN loss as 0.
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite from the log.")
    log_level_replica: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] = option(
        "error", "Least level of what the other processes log; that of the first one is log_level.", public="never"
    )
    # Declared again, as transformers' own command line takes it for yes or no only.
    include_num_input_tokens_seen: str = option(
        "no", "Log the tokens of training so far, and their rate: all, or non_padding.", nargs="?", const="all"
    )
    report_to: list[str] = option(
        ["none"],
        "Services to report to, such as tensorboard or wandb; none, or all that are installed.",
        public="never",
    )
    card_language: Literal["en", "zh"] = option("en", "Language of the model card, README.md in output_dir.")
    card_examples: int = option(
        3, "Rows of --test_file that the model card shows with their answers, on the Hub, too; 0 for none."
    )
    base_model_id: str | None = option(
        None,
        "With --push_to_hub: the base's Hub id, which the adapter names there. None: --model_name_or_path.",
        public="never",
        needs=("push_to_hub",),
    )
    early_stopping_patience: int | None = option(
        None, "End training after so many evaluations in a row without a better metric_for_best_model. None: never."
    )
    early_stopping_threshold: float = option(0.0, "By how much the metric must be better to count as better.")
    dpo_beta: float = option(
        0.1,
        "With --objective dpo: how strongly the answers are held to the base's, more with more.",
        recipe="changed",
        needs=("objective=dpo",),
    )
    keep_file: str | None = option(
        None,
        "General prompts, in a form that training reads, or builtin, 200 of this package: how far the answers to them "
        "move from the base's is measured before training, in every evaluation, and after it. None: not measured.",
        recipe="changed",
    )
    max_keep_samples: int = option(
        256,
        "Use only so many prompts of --keep_file; every other one is measured, the rest are for --keep_weight.",
        recipe="changed",
        needs=("keep_file",),
    )
    keep_weight: float = option(
        0.0,
        "Weight of a second loss: the divergence from the base on its own answers to prompts of --keep_file.",
        recipe="changed",
        needs=("keep_file",),
    )
    keep_every: int = option(
        4,
        "Take the second loss every so many steps, then so many times as strong; its cost is the share that the log "
        "tells.",
        recipe="changed",
        needs=("keep_weight",),
    )
    train_sampling_strategy: Literal["auto", "random", "sequential", "group_by_length", "batch_rebalance"] = option(
        "auto",
        "Order of the examples; auto: random, or group_by_length where that costs less padding than packing.",
        recipe="changed",
    )
    # Every trained parameter is used in every step: looking for others would cost time and memory.
    ddp_find_unused_parameters: bool | None = option(False, "Let DDP look for parameters without a gradient.")
    # Given, as the Trainer cannot read them off the signature of a PeftModel.
    label_names: list[str] = option(["labels"], "Columns of a batch that hold labels.")
    # Declared again, as transformers 5.20 has only the old name: both mean the same here, whichever it is.
    activation_checkpointing: bool | None = option(
        None,
        "Compute activations again in the backward pass: less memory, more time.",
        nargs="?",
        const=True,
        recipe="changed",
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keyword arguments for activation checkpointing, as JSON. None: use_reentrant is false.",
        needs=("activation_checkpointing",),
    )
