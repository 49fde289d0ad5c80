"""Register the published tokenizers with `AutoTokenizer` by their class names, without remote code."""

from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from glm_peft.models.tokenization_chatglm import ChatGLMTokenizer
from glm_peft.models.tokenization_glm4 import ChatGLM4Tokenizer


class _ChatGLMTokenizerKey(PretrainedConfig):
    """Key without a use of its own: `AutoTokenizer.register` asks for a config class."""


class _ChatGLM4TokenizerKey(PretrainedConfig):
    """Key of GLM-4-9B's tokenizer."""


def register_tokenizers() -> None:
    """
    Let `AutoTokenizer.from_pretrained` load the published tokenizers; calling it again changes nothing.

    The class name in `tokenizer_config.json` finds them, before any `auto_map` and whatever `trust_remote_code` says.
    """
    AutoTokenizer.register(_ChatGLMTokenizerKey, ChatGLMTokenizer, exist_ok=True)
    AutoTokenizer.register(_ChatGLM4TokenizerKey, ChatGLM4Tokenizer, exist_ok=True)
    # The row would overrule the class name, and a saved ChatGLM has model_type "glm" too. transformers' own GLM
    # tokenizers load as before: the row's class is the default.
    TOKENIZER_MAPPING_NAMES.pop("glm", None)
