"""Register the ChatGLM generations with transformers' Auto classes."""

import logging
import warnings

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from glm_peft.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMModel
from glm_peft.models.glm import register_key_mapping
from glm_peft.models.tokenization_auto import register_tokenizers

AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
register_key_mapping()
register_tokenizers()

# PEFT reads a property that transformers has deprecated, about which a user can do nothing.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# bitsandbytes looks on the Hub for a faster kernel than its own on every import on CPUs with AVX512-BF16.
_SAID_OF_KERNEL = "Failed to load CPU gemm_4bit_forward from kernels-community"
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith(_SAID_OF_KERNEL)
)

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel"]
