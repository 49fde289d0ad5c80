"""The flags of the base model and its adapter, which every command has."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from glm_peft.arguments.fields import flags_with, option, require, require_at_least_one
from glm_peft.arguments.methods import FULL, IA3, IN_EMBEDDINGS, LORA, METHODS, P_TUNING, PREFIX_TUNING
from glm_peft.errors import UserError

SETTING_STARTS = ("zero", "text", "instruction")
"""The values of `--prefix_init` that set the prefix itself, which a projected one does not let them do."""

_NUM_VIRTUAL_TOKENS = 128


# Facts that several flags share, see `option`.
_START_OF_PREFIX = {"methods": (PREFIX_TUNING,), "recipe": "changed", "prediction": "refused"}
_SIZE_OF_PREFIX = {"recipe": "always", "prediction": "ignored"}  # the adapter says it
_LORA_FACTS = {"recipe": "changed", "prediction": "ignored"}


@dataclass(frozen=True)
class ModelArguments:
    """
    The base model and the prefix.

    Raises:
        UserError: no model is given, or a number is out of its range.
    """

    _argument_group_name = "model and adapter"

    model_name_or_path: str = option(
        "", "Base model: a folder in a published layout or a Hub id, such as THUDM/chatglm3-6b. Must be given."
    )
    model_revision: str = option("main", "Branch, tag or commit of the base model on the Hub.")
    cache_dir: str | None = option(None, "Folder for downloaded models. None: the Hub's usual cache.", public="never")
    adapter_name_or_path: str | None = option(
        None,
        "Adapter to continue training from: a folder or a Hub id of a PEFT adapter, or a published P-Tuning v2 "
        "checkpoint. None: a new one.",
        "ptuning_checkpoint",
        prediction="Adapter to answer with: a folder or a Hub id of a PEFT adapter, or a published P-Tuning v2 "
        "checkpoint. None: the base alone.",
    )
    adapter_revision: str | None = option(None, "Branch, tag or commit of the adapter on the Hub. None: main.")
    # Refused without it, as answers would be bad without any error.
    allow_other_base: bool = option(
        False,
        "Use the adapter on a base with other weights than the one it was trained on, with a warning.",
        needs=("adapter_name_or_path",),
    )
    chat_format: Literal["chatglm", "chatglm2", "chatglm3", "glm4", "plain"] | None = option(
        None,
        "Chat format of the prompts. None: the one that the model's files name, or an error if they name none.",
        recipe="always",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Precision of the base; auto: bfloat16 on GPUs and CPUs that have it, else float16 or, on CPUs, "
        "float32, with weights that are stored in 16 bits kept so.",
        recipe="changed",
    )
    quantization_bit: int | None = option(
        None,
        "4 or 8: load the base quantized, which takes a quarter or half of the memory. None: not quantized.",
        recipe="always",
    )
    # None until it is resolved, so that the adapter to go on from decides where nothing is given.
    peft_type: Literal["prefix_tuning", "lora", "p_tuning", "prompt_tuning", "ia3", "none"] | None = option(
        None,
        "Tuning method; none trains the whole base. None: prefix_tuning, or that of --adapter_name_or_path.",
        recipe="always",
        prediction="ignored",
        search="varied",
    )
    attn_implementation: str | None = option(
        None, "Attention of the base: eager, sdpa, flash_attention_2 or flex_attention. None: the best one available."
    )
    num_virtual_tokens: int | None = option(
        None,
        "Length of the prefix in virtual tokens. None: 128, or that of --adapter_name_or_path.",
        "pre_seq_len",
        methods=(PREFIX_TUNING, *IN_EMBEDDINGS),
        **_SIZE_OF_PREFIX,
    )
    prefix_projection: bool | None = option(
        None,
        "Train the prefix as the output of a two-layer network; the adapter holds only the output. None: no, or as "
        "the adapter was trained.",
        methods=(PREFIX_TUNING,),
        **_SIZE_OF_PREFIX,
    )
    encoder_hidden_size: int | None = option(
        None,
        "Width of the network of --prefix_projection. None: the hidden size of the base.",
        methods=(PREFIX_TUNING, P_TUNING),
        **_SIZE_OF_PREFIX,
    )
    prefix_init: Literal["normal", "zero", "text", "instruction"] | None = option(
        None,
        "Initial values of a new prefix: normal, random numbers; zero; text, the keys and values of "
        "--prefix_init_text; instruction, those of a neutral instruction. None: random numbers as PEFT draws them.",
        **_START_OF_PREFIX,
    )
    prefix_init_text: str | None = option(
        None,
        "With --prefix_init text: the text, cut or repeated to the length of the prefix.",
        public="text",
        **_START_OF_PREFIX,
    )
    # 0.02 is the standard deviation that transformers initializes embeddings with.
    prefix_init_std: float = option(
        0.02,
        "Standard deviation of --prefix_init normal; PEFT's own is 1.",
        needs=("prefix_init=normal",),
        **_START_OF_PREFIX,
    )
    prefix_dropout: float = option(
        0.0, "Share of the prefix's values dropped in training; published: 0.1.", **_START_OF_PREFIX
    )
    lora_rank: int | None = option(None, "Rank of --peft_type lora. None: 8.", methods=(LORA,), **_LORA_FACTS)
    lora_alpha: int | None = option(
        None,
        "LoRA's alpha: its product is scaled by alpha / rank. None: twice the rank.",
        methods=(LORA,),
        **_LORA_FACTS,
    )
    lora_dropout: float = option(
        0.0, "Share of the inputs that LoRA drops in training.", methods=(LORA,), **_LORA_FACTS
    )
    target_modules: list[str] | None = option(
        None,
        "Layers to which LoRA or (IA)3 is added, by the last parts of their names. None: the usual ones of the model.",
        methods=(LORA, IA3),
        **_LORA_FACTS,
    )
    # Not by default, as an adapter is used with the tokenizer of its base.
    save_tokenizer: bool = option(False, "Put the tokenizer's files beside the adapter.", prediction="refused")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is not given: name a folder or a Hub id of a ChatGLM model.")
        self._fill_in(quantization_bit=self.quantization_bit or None)  # published scripts give 0 for no quantization
        if self.quantization_bit not in (None, 4, 8):
            raise UserError(f"--quantization_bit must be 4 or 8, found {self.quantization_bit}.")
        require_at_least_one(self, "num_virtual_tokens", "encoder_hidden_size", "lora_rank", "lora_alpha")
        require(0 <= self.lora_dropout < 1, "--lora_dropout must be at least 0 and below 1", self.lora_dropout)
        self._check_initialization()
        if not self.adapter_name_or_path:  # otherwise the adapter decides what is not given
            self._fill_in_defaults()
        if self.peft_type:
            self._check_method()
        if self.encoder_hidden_size and not self.prefix_projection and self.peft_type != P_TUNING:
            raise UserError("--encoder_hidden_size is for --prefix_projection only: give both or neither.")

    @property
    def keeps_tokenizer(self) -> bool:
        """Whether the tokenizer is saved with the result: if asked for, or with a full model, which needs it."""
        return self.save_tokenizer or self.peft_type == FULL

    def _fill_in(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # a frozen dataclass; called from __post_init__ alone

    def _fill_in_defaults(self) -> None:
        method = self.peft_type or PREFIX_TUNING
        self._fill_in(peft_type=method, prefix_projection=bool(self.prefix_projection))
        if "num_virtual_tokens" in flags_of(method):
            self._fill_in(num_virtual_tokens=self.num_virtual_tokens or _NUM_VIRTUAL_TOKENS)
        if method == FULL and self.dtype == "auto":
            self._fill_in(dtype="float32")  # half precision rounds off the small steps of full fine-tuning

    def _check_initialization(self) -> None:
        if (self.prefix_init == "text") != (self.prefix_init_text is not None):
            raise UserError("--prefix_init text and --prefix_init_text belong together: give both or neither.")
        if self.prefix_init in SETTING_STARTS and self.prefix_projection:
            raise UserError(f"--prefix_init {self.prefix_init} sets the prefix itself: leave out --prefix_projection.")
        if self.prefix_init and self.adapter_name_or_path:
            raise UserError("--prefix_init is for a new prefix: leave it out, or --adapter_name_or_path.")
        require(self.prefix_init_std > 0, "--prefix_init_std must be above 0", self.prefix_init_std)
        require(0 <= self.prefix_dropout < 1, "--prefix_dropout must be at least 0 and below 1", self.prefix_dropout)

    def _check_method(self) -> None:
        """Raise a `UserError` where a flag of another method than `peft_type` is given."""
        defaults = {own.name: own.default for own in fields(self)}
        # By value, as this also runs on copies that `changed` makes; false is how a resolved projection says no.
        given = (name for name in flags_with(self, "methods") if getattr(self, name) not in (defaults[name], False))
        foreign = [name for name in given if name not in flags_of(self.peft_type)]
        if foreign:
            owners = " or ".join(method for method in METHODS if foreign[0] in flags_of(method))
            likewise = "".join(f", --{name} likewise" for name in foreign[1:])
            raise UserError(
                f"--{foreign[0]} is for --peft_type {owners}, and this is {self.peft_type}: leave one of them out"
                f"{likewise}."
            )
        if self.peft_type == FULL and self.quantization_bit:
            raise UserError(
                "--peft_type none trains the base itself, which --quantization_bit would freeze: leave one of them "
                "out."
            )
        if self.peft_type == FULL and self.adapter_name_or_path:
            raise UserError(
                "--peft_type none makes no adapter: leave out --adapter_name_or_path, or merge that adapter into the "
                "base first, with python -m glm_peft.convert merge."
            )


def flags_of(method: str) -> list[str]:
    """Return the names of the flags that belong to a method, a value of `--peft_type`."""
    return [own.name for own in fields(ModelArguments) if method in own.metadata.get("methods", ())]
