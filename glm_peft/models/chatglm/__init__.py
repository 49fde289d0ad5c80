"""ChatGLM-6B, the one network of the family that transformers does not have."""

from glm_peft.models.chatglm.configuration_chatglm import ChatGLMConfig
from glm_peft.models.chatglm.modeling_chatglm import ChatGLMForCausalLM, ChatGLMModel

__all__ = ["ChatGLMConfig", "ChatGLMForCausalLM", "ChatGLMModel"]
