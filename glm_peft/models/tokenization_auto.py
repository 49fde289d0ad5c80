"""`AutoTokenizer` finds the published tokenizers by their class names, without remote code."""

from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from glm_peft.models.tokenization_chatglm import ChatGLMTokenizer
from glm_peft.models.tokenization_glm4 import ChatGLM4Tokenizer


class _ChatGLMTokenizerKey(PretrainedConfig):
    """`AutoTokenizer.register` asks for a config class; what finds the tokenizer is its class name in the files."""


class _ChatGLM4TokenizerKey(PretrainedConfig):
    """The same for GLM-4-9B."""


def register_tokenizers() -> None:
    """
    Let `AutoTokenizer.from_pretrained` load the published tokenizers; calling it again changes nothing.

    transformers has a row for `model_type: "glm"` that overrules the class name in `tokenizer_config.json`, although
    a converted ChatGLM has that type too. Without the row the name decides, before any `auto_map` and whatever
    `trust_remote_code` says; transformers' own GLM tokenizers load as before, since the row's class is its default.
    """
    AutoTokenizer.register(_ChatGLMTokenizerKey, ChatGLMTokenizer, exist_ok=True)
    AutoTokenizer.register(_ChatGLM4TokenizerKey, ChatGLM4Tokenizer, exist_ok=True)
    TOKENIZER_MAPPING_NAMES.pop("glm", None)
