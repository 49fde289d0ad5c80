"""
What `--peft_type` may be: the learning rate of each method, and the generations that it cannot tune.

Apart from PEFT's configs (`glm_peft.adapters.other_methods`), as importing PEFT is slow and `--help` needs none of it.
"""

from dataclasses import dataclass

from glm_peft.errors import UserError

PREFIX_TUNING, LORA, P_TUNING, PROMPT_TUNING = "prefix_tuning", "lora", "p_tuning", "prompt_tuning"
IA3, FULL = "ia3", "none"


@dataclass(frozen=True)
class Method:
    """What a method is called, and its highest learning rate where none is given."""

    learning_rate: float
    title: str


METHODS = {
    PREFIX_TUNING: Method(5e-3, "P-Tuning v2 prefix"),
    LORA: Method(2e-4, "LoRA adapter"),
    P_TUNING: Method(5e-3, "P-Tuning adapter"),
    PROMPT_TUNING: Method(3e-2, "prompt tuning adapter"),
    IA3: Method(5e-3, "(IA)³ adapter"),
    FULL: Method(1e-5, "fully fine-tuned model"),
}
"""By the value of `--peft_type`."""

IN_EMBEDDINGS = (P_TUNING, PROMPT_TUNING)
"""Virtual tokens that stand before the embeddings of a row."""

CONTINUED = (PREFIX_TUNING, LORA, PROMPT_TUNING, IA3)
"""What training can go on from: of p_tuning PEFT saves only the result."""

MERGED = (LORA, IA3)
"""What can be added into the weights of the base."""


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
