"""
The methods of `--peft_type`: the learning rate of each, and the generations that it cannot tune.

Apart from PEFT's configs (`glm_peft.adapters.other_methods`), as importing PEFT is slow and `--help` needs none of it.
"""

from dataclasses import dataclass

from glm_peft.errors import UserError

PREFIX_TUNING, LORA, P_TUNING, PROMPT_TUNING = "prefix_tuning", "lora", "p_tuning", "prompt_tuning"
IA3, FULL = "ia3", "none"  # none: no adapter, the base itself is trained

_FAR = 20  # times a method's learning rate, or a part of it: small models such as the demo's take as much


@dataclass(frozen=True)
class Method:
    """The name of a method in a model card, and its highest learning rate where none is given."""

    learning_rate: float
    title: str

    def is_far(self, learning_rate: float) -> bool:
        """Return whether a learning rate is far from that of the method, above or below it."""
        return not 1 / _FAR <= learning_rate / self.learning_rate <= _FAR


# A prefix at a quarter of the published 2e-2, which on narrow data makes a base forget everything else.
METHODS = {
    PREFIX_TUNING: Method(5e-3, "P-Tuning v2 prefix"),
    LORA: Method(2e-4, "LoRA adapter"),
    P_TUNING: Method(5e-3, "P-Tuning adapter"),
    PROMPT_TUNING: Method(3e-2, "prompt tuning adapter"),
    IA3: Method(5e-3, "(IA)³ adapter"),
    FULL: Method(1e-5, "fully fine-tuned model"),
}
"""The methods by their value of `--peft_type`."""

IN_EMBEDDINGS = (P_TUNING, PROMPT_TUNING)
"""The methods whose virtual tokens stand before the embeddings of a row."""

CONTINUED = (PREFIX_TUNING, LORA, PROMPT_TUNING, IA3)
"""The methods that training can go on from: of p_tuning PEFT saves only the result."""

MERGED = (LORA, IA3)
"""The methods whose adapters can be merged into the weights of the base."""


def check_generation_of_method(peft_type: str, model_type: str) -> None:
    """Raise a `UserError` where the method cannot tune a base of this type."""
    # ChatGLM-6B finds the positions of a row by the ids of `[gMASK]` and `<sop>`: a row of embeddings has none.
    if peft_type in IN_EMBEDDINGS and model_type == "chatglm":
        raise UserError(
            f"--peft_type {peft_type} cannot tune ChatGLM-6B, which reads the positions of a row off its token ids, "
            "and this method gives the base embeddings alone: use prefix_tuning, lora or ia3."
        )
