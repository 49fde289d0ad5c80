"""Every argument of training: which model and prefix, which data, and how to train, score and generate."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments

from glm_peft.command_line import parse_command, warn
from glm_peft.errors import UserError
from glm_peft.former_options import IGNORED

_USAGE = "accelerate launch glm_peft/train.py [CONFIG.yaml|CONFIG.json] [--flags]"
_DESCRIPTION = "P-Tuning v2 for ChatGLM models. Flags win over the file, whose keys are the flags without --."
_EPILOG = f"Accepted from published scripts, without effect: {', '.join(IGNORED)}."
_LOSSES = ("loss", "eval_loss")


def _option(default: Any, help: str, *aliases: str, **metadata: Any) -> Any:
    """A dataclass field with a help text and other names for its flag."""
    metadata |= {"help": help} | ({"aliases": [f"--{alias}" for alias in aliases]} if aliases else {})
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """
    The base model and the prefix.

    Raises:
        UserError: no model is given, or a number is out of its range.
    """

    _argument_group_name = "model and prefix"

    model_name_or_path: str = _option(
        "", "Base model: a folder in a published layout or a Hub id, such as THUDM/chatglm3-6b. Must be given."
    )
    model_revision: str = _option("main", "Branch, tag or commit of the base model on the Hub.")
    cache_dir: str | None = _option(None, "Folder for downloaded models. None: the Hub's usual cache.")
    adapter_name_or_path: str | None = _option(
        None,
        "Adapter to go on from: a folder or a Hub id of a PEFT prefix, or a published P-Tuning v2 checkpoint. "
        "None: a new prefix.",
        "ptuning_checkpoint",
    )
    chat_format: Literal["chatglm", "chatglm2", "chatglm3", "glm4", "plain"] | None = _option(
        None, "Form of the prompts. None: what the model's files say, or an error where they do not say it."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Precision of the base; auto: bfloat16 on GPUs that have it, float16 on others, float32 on CPUs."
    )
    quantization_bit: int | None = _option(
        None, "4 or 8: load the base quantized, which takes a quarter or half of the memory. None: not quantized."
    )
    attn_implementation: str | None = _option(
        None, "Attention of the base: eager, sdpa, flash_attention_2 or flex_attention. None: the best at hand."
    )
    num_virtual_tokens: int = _option(128, "Length of the prefix in virtual tokens.", "pre_seq_len")
    prefix_projection: bool = _option(
        False, "Train the prefix through a two-layer network, of which the result is kept."
    )
    encoder_hidden_size: int | None = _option(
        None, "Width of the network of --prefix_projection. None: the hidden size of the base."
    )
    save_tokenizer: bool = _option(False, "Put the tokenizer's files beside the adapter.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is not given: name a folder or a Hub id of a ChatGLM model.")
        self.quantization_bit = self.quantization_bit or None  # published scripts say 0 for none
        if self.quantization_bit not in (None, 4, 8):
            raise UserError(f"--quantization_bit must be 4 or 8, found {self.quantization_bit}.")
        _require_at_least_one(self, "num_virtual_tokens", "encoder_hidden_size")
        if self.encoder_hidden_size and not self.prefix_projection:
            raise UserError("--encoder_hidden_size is for --prefix_projection only: give both or neither.")


@dataclass
class DataArguments:
    """
    The files, their columns, and how many tokens of a row are used.

    Raises:
        UserError: a number is out of its range.
    """

    _argument_group_name = "data"

    train_file: str | None = _option(None, "Rows to train on (.json, .jsonl, .csv, .parquet). None: --dataset_name.")
    validation_file: str | None = _option(None, "Rows for --do_eval, in the same form. None: --dataset_name.")
    test_file: str | None = _option(None, "Rows for --do_predict; answers may be missing. None: --dataset_name.")
    dataset_name: str | None = _option(None, "Data set on the Hub for splits without a file. None: only files.")
    dataset_config_name: str | None = _option(None, "Configuration of --dataset_name. None: its default.")
    prompt_column: str | None = _option(
        None, "Column of the questions. None: content or prompt, or the messages of messages or conversations."
    )
    response_column: str | None = _option(None, "Column of the answers. None: summary or response.")
    history_column: str | None = _option(
        None, "Column of earlier [question, answer] pairs. None: history, where the questions stand in prompt."
    )
    source_prefix: str | None = _option(None, "Text before every question. None: nothing.")
    max_source_length: int = _option(1024, "Most tokens of a prompt, special ones counted; longer ones are cut.")
    max_target_length: int = _option(128, "Most tokens of an answer, its end token counted; longer ones are cut.")
    val_max_target_length: int | None = _option(None, "The same in evaluation. None: --max_target_length.")
    max_train_samples: int | None = _option(None, "Use only so many rows to train on. None: all.")
    max_eval_samples: int | None = _option(None, "Use only so many rows to evaluate on. None: all.")
    max_predict_samples: int | None = _option(None, "Use only so many rows to predict. None: all.")
    train_on: Literal["all", "last"] = _option("all", "In rows of messages, train on every answer or on the last one.")
    skip_bad_rows: bool = _option(False, "Leave out and count rows that cannot be used, instead of stopping there.")
    ignore_pad_token_for_loss: bool = _option(True, "Whether padding has no part in the loss.")
    preprocessing_num_workers: int | None = _option(None, "Processes that encode rows. None: this one alone.")
    overwrite_cache: bool = _option(False, "Changes nothing: rows are encoded anew in every run.")
    metric_protocol: Literal["thudm", "chatglm3"] | None = _option(
        None, "How BLEU-4 is taken: over characters, times 100, or over words. None: as published for the chat format."
    )

    def __post_init__(self) -> None:
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length
        _require_at_least_one(
            self,
            "max_source_length",
            "max_target_length",
            "val_max_target_length",
            "max_train_samples",
            "max_eval_samples",
            "max_predict_samples",
            "preprocessing_num_workers",
        )


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """
    transformers' own arguments with defaults for a prefix, and the settings of generation.

    Raises:
        UserError: `output_dir` is missing, a number is out of its range, a token for the Hub is given (it would be
            saved in clear), `push_to_hub` is given, or the best model is asked for by a score without
            `predict_with_generate`.
    """

    _argument_group_name = "training, evaluation and generation"

    learning_rate: float = _option(
        5e-3, "Highest learning rate; a prefix alone needs some hundred times that of full fine-tuning."
    )
    logging_steps: float = _option(10, "Log every so many steps, or, below 1, after each such share of all steps.")
    # On, it shows a loss that is not a number as 0.
    logging_nan_inf_filter: bool = _option(False, "Hide losses that are not finite from the log.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Services to report to, such as tensorboard or wandb; none, or all that are installed."},
    )
    # Every trained parameter is used in every step: looking for others would cost time and memory.
    ddp_find_unused_parameters: bool | None = _option(False, "Let DDP look for parameters without a gradient.")
    label_names: list[str] = field(
        default_factory=lambda: ["labels"], metadata={"help": "Columns of a batch that hold labels."}
    )
    # Declared again, as transformers 5.20 has only the old name: both mean the same here, whichever it is.
    activation_checkpointing: bool | None = _option(
        None, "Compute activations again in the backward pass: less memory, more time.", nargs="?", const=True
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments for activation checkpointing, as JSON. None: use_reentrant is false."
    )
    max_new_tokens: int | None = _option(
        None, "Most tokens of a generated answer, its end token counted. None: --val_max_target_length."
    )
    num_beams: int = _option(1, "Beams of the search for an answer; 1 is no beam search.")
    do_sample: bool = _option(False, "Draw answers at random instead of taking the most likely tokens.")
    top_p: float | None = _option(
        None, "With --do_sample: draw from the likeliest tokens of this probability together. None: 0.7."
    )
    top_k: int | None = _option(None, "With --do_sample: draw from this many tokens at most; 0 is no limit. None: 50.")
    temperature: float | None = _option(
        None, "With --do_sample: above 1 more varied answers, near 0 the most likely ones. None: 0.95."
    )

    def __post_init__(self) -> None:
        self._check_values()
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
        super().__post_init__()
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.n_gpu > 1:
            # One process would use them by DataParallel, which copies no hooks, and the prefix needs some.
            warn(f"{self.n_gpu} GPUs are there, one is used: accelerate launch --num_processes {self.n_gpu} uses all.")
            self._n_gpu = 1
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        by_score = self.load_best_model_at_end and self.metric_for_best_model not in _LOSSES
        if by_score and not self.predict_with_generate:
            raise UserError(
                f"--metric_for_best_model {self.metric_for_best_model} is a score of generated answers: "
                "give --predict_with_generate too, or use loss."
            )

    def _check_values(self) -> None:
        if not self.output_dir:
            raise UserError("--output_dir is not given: name a folder for the adapter and the results.")
        if self.hub_token is not None:
            raise UserError("hub_token would be saved in clear: set the environment variable HF_TOKEN instead.")
        if self.push_to_hub:
            raise UserError(
                "--push_to_hub is not part of this version: train without it, and send the adapter afterwards with "
                f"`hf upload REPOSITORY {self.output_dir} --exclude 'checkpoint-*'`."
            )
        for name in self._VALID_DICT_FIELDS:
            _require_json(name, getattr(self, name))
        _require_at_least_one(
            self,
            "max_new_tokens",
            "num_beams",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        )
        _require(self.learning_rate > 0, "--learning_rate must be above 0", self.learning_rate)
        if not self.do_sample:
            self._drop_sampling()
        _require(self.top_p is None or 0 < self.top_p <= 1, "--top_p must be above 0 and at most 1", self.top_p)
        _require(self.top_k is None or self.top_k >= 0, "--top_k must be 0 or more", self.top_k)
        _require(self.temperature is None or self.temperature > 0, "--temperature must be above 0", self.temperature)

    def _drop_sampling(self) -> None:
        # A warning, not an error: `--do_sample false` must be able to win over a recipe that samples.
        for name in ("top_p", "top_k", "temperature"):
            if getattr(self, name) is not None:
                warn(f"--{name} has no effect without --do_sample.")
                setattr(self, name, None)


def parse_train_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """
    The arguments of `glm_peft/train.py [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Args:
        argv: the words after the script's name; `None` for those of this process.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    types = (ModelArguments, DataArguments, TrainingArguments)
    argv = sys.argv[1:] if argv is None else argv
    words = {"usage": _USAGE, "description": _DESCRIPTION, "epilog": _EPILOG}
    model_args, data_args, training_args = parse_command(argv, types, **words)
    _check_tasks(data_args, training_args)
    training_args.max_new_tokens = training_args.max_new_tokens or data_args.val_max_target_length
    return model_args, data_args, training_args


def _check_tasks(data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Something is to be done, and there is data for it."""
    files = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
    wanted = [task for task in files if getattr(training_args, task)]
    if not wanted:
        raise UserError("There is nothing to do: give --do_train, --do_eval or --do_predict.")
    for task in wanted:
        if getattr(data_args, files[task]) is None and data_args.dataset_name is None:
            raise UserError(f"--{task} needs data: give --{files[task]} or --dataset_name.")


def _require_at_least_one(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        _require(value is None or value >= 1, f"--{name} must be at least 1", value)


def _require_json(name: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"--{name} is not JSON ({error}), found {value}.") from error


def _require(holds: bool, rule: str, found: Any) -> None:
    if not holds:
        raise UserError(f"{rule}, found {found}.")
