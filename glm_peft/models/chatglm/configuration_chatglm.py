"""Define ChatGLM-6B's config, and read every published config of `model_type: "chatglm"`."""

from typing import Any

from transformers import PreTrainedConfig

from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM
from glm_peft.models.glm.configuration_glm import GlmConfig, check_generation, is_published, translate_config

# The older revision keeps 20000 ids for images before those of text, and its config may leave out the ids below.
_OLD_REVISION_VOCABULARY = 150528
_OLD_REVISION_IDS = {
    "mask_token_id": 150000,
    "gmask_token_id": 150001,
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "pad_token_id": 20003,
}


class ChatGLMConfig(PreTrainedConfig):
    """
    ChatGLM-6B's config, which has transformers' field names and also reads the published ones.

    `mask_token_id` and `gmask_token_id` are `[MASK]` and `[gMASK]`, `bos_token_id` is `<sop>`.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_layers": "num_hidden_layers",
        "inner_hidden_size": "intermediate_size",
        "layernorm_epsilon": "layer_norm_eps",
        "max_sequence_length": "max_position_embeddings",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    hidden_act: str = "gelu_pytorch_tanh"  # the published code has the tanh form of GELU, and no field for it
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True  # checkpoints store lm_head.weight too, with the same values
    rope_theta: float = 10000.0
    position_encoding_2d: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int | None = 130000
    gmask_token_id: int | None = 130001

    @property
    def head_dim(self) -> int:
        """Return the size of one head; PEFT sizes the prefix by it."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Return the number of heads, each of which has keys and values of its own; PEFT reads it under this name."""
        return self.num_attention_heads

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """
        Return the config of the generation that the fields describe: four share `model_type: "chatglm"`.

        Args:
            generation (keyword): wins over what the recorded name tells, where ChatGLM2 and ChatGLM3 differ.

        Raises:
            UserError: the weights are pre-quantized, or the fields are of no known generation or not of the one asked
                for.
        """
        generation = kwargs.pop("generation", None)
        # Without auto_map the Auto classes find no remote code to run, whatever trust_remote_code says.
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        _refuse_quantized_weights(config_dict)
        # The Auto classes choose the network by the class of what is returned, not by model_type.
        if is_published(config_dict):
            return GlmConfig.from_dict(translate_config(config_dict, generation), **kwargs)
        if not {"position_encoding_2d", "inner_hidden_size"} & config_dict.keys():
            raise UserError(
                'The config says model_type "chatglm" but has neither the fields of ChatGLM-6B (position_encoding_2d, '
                "inner_hidden_size) nor of ChatGLM2, ChatGLM3 and GLM-4 (multi_query_group_num); known generations "
                "are ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and GLM-4-0414: use one of their repositories."
            )
        check_generation(generation, (CHATGLM,), config_dict)
        return super().from_dict(_with_old_revision_ids(config_dict), **kwargs)


def _refuse_quantized_weights(config: dict[str, Any]) -> None:
    bits = config.get("quantization_bit")
    if not bits:
        return
    name = config.get("_name_or_path") or "this repository"
    raise UserError(
        f"{name} holds pre-quantized int{bits} weights (quantization_bit in its config.json), which glm_peft does not "
        f"read, as it loads full-precision weights: use the repository without -int{bits} and --quantization_bit 4 "
        "or 8, which quantizes while loading."
    )


def _with_old_revision_ids(config: dict[str, Any]) -> dict[str, Any]:
    """Add the special ids of the older revision where its config leaves them out."""
    is_old = config.get("vocab_size") == _OLD_REVISION_VOCABULARY
    return _OLD_REVISION_IDS | config if is_old else config
