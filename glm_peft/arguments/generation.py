"""The flags of generation, which training and prediction share."""

from dataclasses import dataclass

from glm_peft.arguments.fields import option

_GENERATES = ("predict_with_generate", "do_predict")
_DRAWS = ("do_sample",)


@dataclass
class GenerationArguments:
    """How answers are generated, in the evaluation and prediction of training and in `glm_peft.predict`."""

    max_new_tokens: int | None = option(
        None,
        "Most tokens of a generated answer, its end token counted. None: --val_max_target_length.",
        needs=_GENERATES,
    )
    num_beams: int = option(1, "Number of beams; 1 is no beam search.", needs=_GENERATES)
    do_sample: bool = option(
        False, "Sample answers at random instead of always taking the most likely token.", needs=_GENERATES
    )
    top_p: float | None = option(  # None, so that one that is given without --do_sample is told from a default
        None,
        "With --do_sample: sample from the most likely tokens up to this total probability. None: 0.7.",
        needs=_DRAWS,
    )
    top_k: int | None = option(
        None, "With --do_sample: sample from this many tokens at most; 0 is no limit. None: 50.", needs=_DRAWS
    )
    temperature: float | None = option(
        None,
        "With --do_sample: higher gives more varied answers, near 0 the most likely ones. None: 0.95.",
        needs=_DRAWS,
    )
