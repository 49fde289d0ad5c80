"""Load ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as transformers' `GlmForCausalLM`, by translating config and names."""

from glm_peft.models.glm.configuration_glm import GlmConfig
from glm_peft.models.glm.key_mapping import register_key_mapping

__all__ = ["GlmConfig", "register_key_mapping"]
