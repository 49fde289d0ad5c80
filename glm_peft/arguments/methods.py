"""
What `--peft_type` may be: the flags of each method, its learning rate, and the generations that it cannot tune.

Apart from PEFT's configs (`glm_peft.adapters.other_methods`), as importing PEFT is slow and `--help` needs none of it.
"""

from dataclasses import dataclass
from typing import Any

from glm_peft.errors import UserError

PREFIX_TUNING, LORA, P_TUNING, PROMPT_TUNING = "prefix_tuning", "lora", "p_tuning", "prompt_tuning"
IA3, FULL = "ia3", "none"

_PREFIX_FLAGS = ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size")
_PREFIX_FLAGS += ("prefix_init", "prefix_init_text", "prefix_init_std", "prefix_dropout")
_LORA_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
_OWN_FLAGS = tuple(dict.fromkeys(_PREFIX_FLAGS + _LORA_FLAGS))


@dataclass(frozen=True)
class Method:
    """One method: its highest learning rate if none is given, the flags that are its own, what it is called."""

    learning_rate: float
    flags: tuple[str, ...]
    title: str


METHODS = {
    PREFIX_TUNING: Method(5e-3, _PREFIX_FLAGS, "P-Tuning v2 prefix"),
    LORA: Method(2e-4, _LORA_FLAGS, "LoRA adapter"),
    P_TUNING: Method(5e-3, ("num_virtual_tokens", "encoder_hidden_size"), "P-Tuning adapter"),
    PROMPT_TUNING: Method(3e-2, ("num_virtual_tokens",), "prompt tuning adapter"),
    IA3: Method(5e-3, ("target_modules",), "(IA)³ adapter"),
    FULL: Method(1e-5, (), "fully fine-tuned model"),
}
"""By the value of `--peft_type`."""

IN_EMBEDDINGS = (P_TUNING, PROMPT_TUNING)
"""Virtual tokens that stand before the embeddings of a row."""

CONTINUED = (PREFIX_TUNING, LORA, PROMPT_TUNING, IA3)
"""What training can go on from: of p_tuning PEFT saves only the result."""

MERGED = (LORA, IA3)
"""What can be added into the weights of the base."""


def check_flags(model_args: Any, defaults: dict[str, Any]) -> None:
    """
    Raise a `UserError` where a flag of another method than `peft_type` is given.

    Args:
        model_args: `ModelArguments`.
        defaults: of its flags; another value was given.
    """
    peft_type = model_args.peft_type
    given = [name for name in _OWN_FLAGS if getattr(model_args, name) not in (defaults[name], False)]
    foreign = [name for name in given if name not in METHODS[peft_type].flags]
    if foreign:
        owners = " or ".join(name for name, method in METHODS.items() if foreign[0] in method.flags)
        raise UserError(f"--{foreign[0]} is for --peft_type {owners}, and this is {peft_type}: leave one of them out.")
    if peft_type == FULL and model_args.quantization_bit:
        raise UserError(
            "--peft_type none trains the base itself, which --quantization_bit would freeze: leave one of them out."
        )
    if peft_type == FULL and model_args.adapter_name_or_path:
        raise UserError(
            "--peft_type none makes no adapter: leave out --adapter_name_or_path, or merge that adapter into the base "
            "first, with python -m glm_peft.convert merge."
        )


def check_generation_of_method(peft_type: str, model_type: str) -> None:
    """
    Raise a `UserError` where the method cannot tune a base of this type.

    ChatGLM-6B finds the positions of a row by its `[gMASK]` and `<sop>`, which virtual tokens before embeddings hide.
    """
    if peft_type in IN_EMBEDDINGS and model_type == "chatglm":
        raise UserError(
            f"--peft_type {peft_type} cannot tune ChatGLM-6B, which reads the positions of a row off its token ids, "
            "and this method gives the base embeddings alone: use prefix_tuning, lora or ia3."
        )


def settle_kind(adapter: str, kind: str, model_args: Any) -> None:
    """
    The method is that of the adapter that training goes on from, as are its rank and the layers that it is on.

    Args:
        kind: the adapter's method.
        model_args: `ModelArguments`, filled in here.

    Raises:
        UserError: something else was given.
    """
    given = getattr(model_args, "peft_type", None)
    if given not in (None, kind):
        raise UserError(
            f"--peft_type {given} contradicts --adapter_name_or_path {adapter}, which is a {kind} adapter: leave one "
            "of the two out."
        )
    for name in _LORA_FLAGS:
        if getattr(model_args, name, None):
            raise UserError(f"--{name} is for a new adapter: leave it out, or --adapter_name_or_path.")
    model_args.peft_type = kind
    if hasattr(model_args, "check_flags"):
        model_args.check_flags()


def keeps_tokenizer(model_args: Any) -> bool:
    """Whether the tokenizer belongs to what a run leaves: a model is none without it."""
    return model_args.save_tokenizer or model_args.peft_type == FULL


def settle_method(model_args: Any, data_args: Any, training_args: Any, model_type: str) -> None:
    """
    Settle what the method decides where nothing was given: the learning rate, and that some rows cannot be packed.

    To be called when `peft_type` is known, and before anything that takes long.

    Args:
        model_args: `ModelArguments`, with the `peft_type` of the adapter to go on from, if there is one.
        model_type: of the base's config.

    Raises:
        UserError: the method cannot tune this base, or what is asked for cannot be done with it.
    """
    peft_type = model_args.peft_type
    check_generation_of_method(peft_type, model_type)
    if not training_args.learning_rate_is_given:
        training_args.learning_rate = METHODS[peft_type].learning_rate
    if peft_type in IN_EMBEDDINGS:
        if data_args.packing:
            raise UserError(
                f"--packing puts several examples into a row, and the virtual tokens of --peft_type {peft_type} stand "
                "before the first one only: leave one of them out."
            )
        data_args.packing = False
    if peft_type == FULL and training_args.label_smoothing_factor:
        raise UserError("--label_smoothing_factor needs a frozen head, which --peft_type none trains: leave it out.")
