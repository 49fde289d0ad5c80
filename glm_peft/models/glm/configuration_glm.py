"""The published configs of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, told in the fields of transformers' `GlmConfig`."""

from typing import Any

import transformers

from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM2, CHATGLM3, generation_of_name

_RENAMED = {
    "padded_vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "kv_channels": "head_dim",
    "multi_query_group_num": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
    "seq_length": "max_position_embeddings",
}
_KEPT = (
    "hidden_size",
    "num_attention_heads",
    "attention_dropout",
    "use_cache",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "transformers_version",
)
# Another value of one of these is another network.
_PUBLISHED = {
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
}
_PUBLISHED_VOCABULARY = 65024
_CHATGLM3_END_TOKENS = [2, 64795, 64797]  # </s>, <|user|>, <|observation|>


class GlmConfig(transformers.GlmConfig):
    """
    transformers' `GlmConfig`, which also reads a published `config.json`.

    The name is the stock one because the Auto classes find model classes by the config's class name. PEFT asks
    `type(config).from_pretrained(base)` for the vocabulary, so the class itself has to translate.
    """

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The fields of a `config.json`, translated where it is a published one."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (translate_config(config, kwargs.pop("generation", None)) if is_published(config) else config), kwargs


def is_published(config: dict[str, Any]) -> bool:
    """Whether these are fields of ChatGLM2, ChatGLM3 or GLM-4 as published."""
    return "multi_query_group_num" in config


def translate_config(config: dict[str, Any], generation: str | None = None) -> dict[str, Any]:
    """
    Tell a published config in `GlmConfig`'s fields (the table of FORMATS section 2).

    Args:
        config: the published fields.
        generation: wins over what the recorded `_name_or_path` tells.

    Raises:
        UserError: the fields describe another network, or `rope_ratio` could mean two things.
    """
    _refuse_other_networks(config)
    generation = generation or generation_of_name(config.get("_name_or_path"))
    translated = {name: config[name] for name in _KEPT if name in config}
    translated |= {new: config[old] for old, new in _RENAMED.items() if old in config}
    translated |= {"model_type": "glm", "architectures": ["GlmForCausalLM"], "tie_word_embeddings": False}
    translated["rope_parameters"] = _rope_parameters(config, generation)
    if generation == CHATGLM3 and translated["vocab_size"] == _PUBLISHED_VOCABULARY:
        translated["eos_token_id"] = _CHATGLM3_END_TOKENS
    # GlmConfig has defaults of its own for these two, which are GLM-4's.
    return {"eos_token_id": 2, "pad_token_id": 0} | translated


def _refuse_other_networks(config: dict[str, Any]) -> None:
    for name, published in _PUBLISHED.items():
        if config.get(name, published) != published:
            raise UserError(
                f"The config says {name}: {config[name]}, but ChatGLM2, ChatGLM3 and GLM-4 have {name}: {published}; "
                "this is another network, which glm_peft does not know."
            )


def _rope_parameters(config: dict[str, Any], generation: str | None) -> dict[str, Any]:
    """ChatGLM2-6B-32k divides the positions by `rope_ratio`; ChatGLM3 and GLM-4 multiply theta by it."""
    ratio = config.get("rope_ratio") or 1
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return parameters
    if generation is None and config.get("padded_vocab_size") == _PUBLISHED_VOCABULARY:
        raise UserError(
            f"The config has rope_ratio {ratio}, which ChatGLM2 and ChatGLM3 read differently, and its _name_or_path "
            f"({config.get('_name_or_path')!r}) names neither: say which with generation='chatglm2' or 'chatglm3' "
            "(--chat_format on the command line)."
        )
    if generation == CHATGLM2:
        return parameters | {"rope_type": "linear", "factor": float(ratio)}
    return parameters | {"rope_theta": 10000.0 * ratio}
