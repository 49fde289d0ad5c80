"""What of transformers' training arguments is other here, or is added: apart from them, as importing them is slow."""

from dataclasses import dataclass, field
from typing import Any

from glm_peft.shared_arguments import option


@dataclass
class TrainingDefaults:
    """Defaults for a prefix, and the settings of generation."""

    _argument_group_name = "training, evaluation and generation"

    learning_rate: float = option(
        5e-3, "Highest learning rate; a prefix alone needs some hundred times that of full fine-tuning."
    )
    logging_steps: float = option(10, "Log every so many steps, or, below 1, after each such share of all steps.")
    # On, it shows a loss that is not a number as 0.
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite from the log.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Services to report to, such as tensorboard or wandb; none, or all that are installed."},
    )
    # Every trained parameter is used in every step: looking for others would cost time and memory.
    ddp_find_unused_parameters: bool | None = option(False, "Let DDP look for parameters without a gradient.")
    label_names: list[str] = field(
        default_factory=lambda: ["labels"], metadata={"help": "Columns of a batch that hold labels."}
    )
    # Declared again, as transformers 5.20 has only the old name: both mean the same here, whichever it is.
    activation_checkpointing: bool | None = option(
        None, "Compute activations again in the backward pass: less memory, more time.", nargs="?", const=True
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for activation checkpointing, as JSON. None: use_reentrant is false."
    )
    max_new_tokens: int | None = option(
        None, "Most tokens of a generated answer, its end token counted. None: --val_max_target_length."
    )
    num_beams: int = option(1, "Beams of the search for an answer; 1 is no beam search.")
    do_sample: bool = option(False, "Draw answers at random instead of taking the most likely tokens.")
    top_p: float | None = option(
        None, "With --do_sample: draw from the likeliest tokens of this probability together. None: 0.7."
    )
    top_k: int | None = option(None, "With --do_sample: draw from this many tokens at most; 0 is no limit. None: 50.")
    temperature: float | None = option(
        None, "With --do_sample: above 1 more varied answers, near 0 the most likely ones. None: 0.95."
    )
