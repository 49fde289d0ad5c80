"""Which ChatGLM generation a published file belongs to, as far as the file itself says it."""

import re

CHATGLM = "chatglm"
CHATGLM2 = "chatglm2"
CHATGLM3 = "chatglm3"
GLM4 = "glm4"
GENERATIONS = (CHATGLM, CHATGLM2, CHATGLM3, GLM4)

_NAMES = (
    (re.compile(r"chatglm3"), CHATGLM3),
    (re.compile(r"chatglm2|codegeex2"), CHATGLM2),
    (re.compile(r"glm-?4|codegeex4|longwriter-glm4"), GLM4),
    (re.compile(r"chatglm-6b"), CHATGLM),
)


def generation_of_name(recorded_name: str | None) -> str | None:
    """
    The generation that a recorded repository name tells, or `None` where it tells none.

    ChatGLM2 and ChatGLM3 differ in no field that matters, so the name that the repository's own files carry decides
    (`_name_or_path` in `config.json`, `name_or_path` in `tokenizer_config.json`). Never pass the folder's name: a
    folder may be called anything.
    """
    repository = (recorded_name or "").rsplit("/", 1)[-1].lower()
    return next((generation for pattern, generation in _NAMES if pattern.search(repository)), None)
