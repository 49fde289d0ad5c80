"""The arguments that training, prediction and the doctor share: which base and prefix, which data."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from glm_peft.errors import UserError
from glm_peft.methods import FULL, METHODS, P_TUNING, PREFIX_TUNING, check_flags

_NUM_VIRTUAL_TOKENS = 128


def option(default: Any, help: str, *aliases: str, **metadata: Any) -> Any:
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

    model_name_or_path: str = option(
        "", "Base model: a folder in a published layout or a Hub id, such as THUDM/chatglm3-6b. Must be given."
    )
    model_revision: str = option("main", "Branch, tag or commit of the base model on the Hub.")
    cache_dir: str | None = option(None, "Folder for downloaded models. None: the Hub's usual cache.")
    adapter_name_or_path: str | None = option(
        None,
        "Adapter to go on from: a folder or a Hub id of a PEFT prefix, or a published P-Tuning v2 checkpoint. "
        "None: a new prefix.",
        "ptuning_checkpoint",
    )
    adapter_revision: str | None = option(
        None, "Branch, tag or commit of the adapter, where it is on the Hub. None: main."
    )
    allow_other_base: bool = option(
        False, "Use the adapter on a base with other weights than the one it was trained on, with a warning."
    )
    chat_format: Literal["chatglm", "chatglm2", "chatglm3", "glm4", "plain"] | None = option(
        None, "Form of the prompts. None: what the model's files say, or an error where they do not say it."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision of the base; auto: bfloat16 on GPUs that have it, float16 on others, float32 on CPUs."
    )
    quantization_bit: int | None = option(
        None, "4 or 8: load the base quantized, which takes a quarter or half of the memory. None: not quantized."
    )
    peft_type: Literal["prefix_tuning", "lora", "p_tuning", "prompt_tuning", "ia3", "adalora", "none"] | None = option(
        None, "Method; none: train the base itself. None: prefix_tuning, or that of --adapter_name_or_path."
    )
    attn_implementation: str | None = option(
        None, "Attention of the base: eager, sdpa, flash_attention_2 or flex_attention. None: the best at hand."
    )
    num_virtual_tokens: int | None = option(
        None, "Length of the prefix in virtual tokens. None: 128, or that of --adapter_name_or_path.", "pre_seq_len"
    )
    prefix_projection: bool | None = option(
        None,
        "Train the prefix through a two-layer network, of which the result is kept. None: no, or as it was saved.",
    )
    encoder_hidden_size: int | None = option(
        None, "Width of the network of --prefix_projection. None: the hidden size of the base."
    )
    prefix_init: Literal["normal", "text"] | None = option(
        None,
        "Where a new prefix starts: normal, or text, the keys and values of --prefix_init_text. None: PEFT's own.",
    )
    prefix_init_text: str | None = option(
        None, "Instruction that the prefix starts as, cut or repeated to its length."
    )
    prefix_init_std: float = option(0.02, "Standard deviation of --prefix_init normal; PEFT's own is 1.")
    prefix_dropout: float = option(0.0, "Share of the prefix's numbers dropped in training; published: 0.1.")
    lora_rank: int | None = option(None, "Rank of --peft_type lora, or the average one of adalora. None: 8.")
    lora_alpha: int | None = option(None, "Scale of LoRA's product, times the rank. None: twice the rank.")
    lora_dropout: float = option(0.0, "Share of the inputs that LoRA drops in training.")
    target_modules: list[str] | None = option(
        None, "Layers that LoRA or (IA)3 goes on, by the ends of their names. None: those of the generation."
    )
    save_tokenizer: bool = option(False, "Put the tokenizer's files beside the adapter.")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is not given: name a folder or a Hub id of a ChatGLM model.")
        self.quantization_bit = self.quantization_bit or None  # published scripts say 0 for none
        if self.quantization_bit not in (None, 4, 8):
            raise UserError(f"--quantization_bit must be 4 or 8, found {self.quantization_bit}.")
        require_at_least_one(self, "num_virtual_tokens", "encoder_hidden_size", "lora_rank", "lora_alpha")
        require(0 <= self.lora_dropout < 1, "--lora_dropout must be at least 0 and below 1", self.lora_dropout)
        self._check_start()
        if not self.adapter_name_or_path:  # otherwise the adapter decides what is not given
            self._fill_in()
        if self.peft_type:
            self.check_flags()
        if self.encoder_hidden_size and not self.prefix_projection and self.peft_type != P_TUNING:
            raise UserError("--encoder_hidden_size is for --prefix_projection only: give both or neither.")

    def check_flags(self) -> None:
        """Raise a `UserError` where a flag of another method than `peft_type` is given."""
        check_flags(self, {field.name: field.default for field in fields(self)})

    def _fill_in(self) -> None:
        self.peft_type = self.peft_type or PREFIX_TUNING
        self.prefix_projection = bool(self.prefix_projection)
        if "num_virtual_tokens" in METHODS[self.peft_type].flags:
            self.num_virtual_tokens = self.num_virtual_tokens or _NUM_VIRTUAL_TOKENS
        if self.peft_type == FULL and self.dtype == "auto":
            self.dtype = "float32"  # half precision rounds off the small steps of a whole model

    def _check_start(self) -> None:
        if (self.prefix_init == "text") != (self.prefix_init_text is not None):
            raise UserError("--prefix_init text and --prefix_init_text belong together: give both or neither.")
        if self.prefix_init == "text" and self.prefix_projection:
            raise UserError("--prefix_init text sets the prefix itself: leave out --prefix_projection.")
        if self.prefix_init and self.adapter_name_or_path:
            raise UserError("--prefix_init is for a new prefix: leave it out, or --adapter_name_or_path.")
        require(self.prefix_init_std > 0, "--prefix_init_std must be above 0", self.prefix_init_std)
        require(0 <= self.prefix_dropout < 1, "--prefix_dropout must be at least 0 and below 1", self.prefix_dropout)


@dataclass
class DataArguments:
    """
    The files, their columns, and how many tokens of a row are used.

    Raises:
        UserError: a number is out of its range.
    """

    _argument_group_name = "data"

    train_file: str | None = option(None, "Rows to train on (.json, .jsonl, .csv, .parquet). None: --dataset_name.")
    validation_file: str | None = option(
        None, "Rows for --do_eval, in the same form; several as NAME=FILE,NAME=FILE. None: --dataset_name."
    )
    test_file: str | None = option(None, "Rows for --do_predict; answers may be missing. None: --dataset_name.")
    dataset_name: str | None = option(None, "Data set on the Hub for splits without a file. None: only files.")
    dataset_config_name: str | None = option(None, "Configuration of --dataset_name. None: its default.")
    prompt_column: str | None = option(
        None, "Column of the questions. None: content or prompt, or the messages of messages or conversations."
    )
    response_column: str | None = option(None, "Column of the answers. None: summary or response.")
    history_column: str | None = option(
        None, "Column of earlier [question, answer] pairs. None: history, where the questions stand in prompt."
    )
    source_prefix: str | None = option(None, "Text before every question. None: nothing.")
    max_source_length: int = option(1024, "Most tokens of a prompt, special ones counted; longer ones are cut.")
    max_target_length: int = option(128, "Most tokens of an answer, its end token counted; longer ones are cut.")
    val_max_target_length: int | None = option(None, "The same in evaluation. None: --max_target_length.")
    max_train_samples: int | None = option(None, "Use only so many rows to train on. None: all.")
    max_eval_samples: int | None = option(None, "Use only so many rows to evaluate on. None: all.")
    max_predict_samples: int | None = option(None, "Use only so many rows to predict. None: all.")
    packing: bool | None = option(
        None,
        "Train on rows of several examples, which the batch size then counts. None: put the examples of a batch into "
        "fewer rows where that costs less than padding.",
    )
    max_length: int = option(512, "Most tokens of a row with --packing.")
    train_on: Literal["all", "last"] = option("all", "In rows of messages, train on every answer or on the last one.")
    skip_bad_rows: bool = option(False, "Leave out and count rows that cannot be used, instead of stopping there.")
    ignore_pad_token_for_loss: bool = option(True, "Whether padding has no part in the loss.")
    preprocessing_num_workers: int | None = option(None, "Processes that encode rows. None: this one alone.")
    overwrite_cache: bool = option(False, "Changes nothing: rows are encoded anew in every run.")
    metric_protocol: Literal["thudm", "chatglm3"] | None = option(
        None, "How BLEU-4 is taken: over characters, times 100, or over words. None: as published for the chat format."
    )

    def __post_init__(self) -> None:
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length
        require_at_least_one(
            self,
            "max_source_length",
            "max_target_length",
            "val_max_target_length",
            "max_length",
            "max_train_samples",
            "max_eval_samples",
            "max_predict_samples",
            "preprocessing_num_workers",
        )


@dataclass
class GenerationArguments:
    """How answers are generated, in training's evaluation and prediction as in `glm_peft.predict`."""

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


def require_at_least_one(arguments: Any, *names: str) -> None:
    """Raise a `UserError` where one of these numbers is below 1."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name} must be at least 1", value)


def require(holds: bool, rule: str, found: Any) -> None:
    """Raise a `UserError` that names the rule and what was found, unless it holds."""
    if not holds:
        raise UserError(f"{rule}, found {found}.")
