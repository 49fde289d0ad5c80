"""Name the ChatGLM generations, and tell by a published file's own words which one it belongs to."""

import re
from collections.abc import Mapping
from typing import Any

CHATGLM = "chatglm"
CHATGLM2 = "chatglm2"
CHATGLM3 = "chatglm3"
GLM4 = "glm4"
_GLM4_VOCABULARY = 151552
GENERATIONS = (CHATGLM, CHATGLM2, CHATGLM3, GLM4)

_NAMES = (
    (re.compile(r"chatglm3"), CHATGLM3),
    (re.compile(r"chatglm2|codegeex2"), CHATGLM2),
    (re.compile(r"glm-?4|codegeex4|longwriter-glm4"), GLM4),
    (re.compile(r"chatglm-6b"), CHATGLM),
)


def generation_of_name(recorded_name: str | None) -> str | None:
    """
    Return the generation that a recorded repository name stands for, or `None` where it stands for none.

    Args:
        recorded_name: `_name_or_path` of `config.json` or `name_or_path` of `tokenizer_config.json`, never the name of
            the folder, which may be called anything.
    """
    # ChatGLM2 and ChatGLM3 differ in no field that matters, so the recorded name has to decide.
    repository = (recorded_name or "").rsplit("/", 1)[-1].lower()
    return next((generation for pattern, generation in _NAMES if pattern.search(repository)), None)


def generation_by_fields(config: Mapping[str, Any]) -> str | None:
    """Return the one generation that has such fields in its `config.json`, or `None` for ChatGLM2 and ChatGLM3."""
    # Those two have the same fields.
    if config.get("model_type") == "glm4" or _GLM4_VOCABULARY in (
        config.get("padded_vocab_size"),
        config.get("vocab_size"),
    ):
        return GLM4
    return CHATGLM if {"position_encoding_2d", "inner_hidden_size"} & config.keys() else None
