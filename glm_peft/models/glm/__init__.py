"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as transformers' own `GlmForCausalLM`: a config translation, a key mapping."""

from glm_peft.models.glm.configuration_glm import GlmConfig
from glm_peft.models.glm.key_mapping import register_key_mapping

__all__ = ["GlmConfig", "register_key_mapping"]
