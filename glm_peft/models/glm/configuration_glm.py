"""Translate the published configs of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B into transformers' `GlmConfig`."""

from typing import Any

import transformers

from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM2, CHATGLM3, GLM4, generation_of_name

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
# Everything else is dropped, `auto_map` with the repository's own code above all.
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
# Another value of one of these makes it another network, which GlmForCausalLM would compute wrongly.
_PUBLISHED = {
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
}
_POSSIBLE_GENERATIONS = (CHATGLM2, CHATGLM3, GLM4)
_CHATGLM3_VOCABULARY = 65024
_GLM4_VOCABULARY = 151552
# </s>, <|user|>, <|observation|>: the model ends a turn with the next speaker too, where its config has only </s>.
_CHATGLM3_END_TOKENS = [2, 64795, 64797]


class GlmConfig(transformers.GlmConfig):
    """transformers' `GlmConfig`, which also reads a published `config.json`."""

    # The class has transformers' name because the Auto classes find model classes by it.

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read the fields of a `config.json`, and translate them where it is a published one."""
        # Here, because PEFT asks `type(config).from_pretrained(base)` for the vocabulary: where that was not the
        # model's, it would save the embeddings and the head in every adapter.
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (translate_config(config, kwargs.pop("generation", None)) if is_published(config) else config), kwargs


def is_published(config: dict[str, Any]) -> bool:
    """Whether these are the fields of a ChatGLM2, ChatGLM3 or GLM-4 as published."""
    return "multi_query_group_num" in config


def translate_config(config: dict[str, Any], generation: str | None = None) -> dict[str, Any]:
    """
    Translate a published config into `GlmConfig`'s fields (the table of FORMATS section 2).

    Args:
        config: the published fields.
        generation: wins over what the recorded `_name_or_path` says.

    Raises:
        UserError: the fields describe another network or generation, or `rope_ratio` could mean two things.
    """
    _refuse_other_networks(config)
    check_generation(generation, _POSSIBLE_GENERATIONS, config)
    generation = generation or _recorded_generation(config)
    translated = {name: config[name] for name in _KEPT if name in config}
    translated |= {new: config[old] for old, new in _RENAMED.items() if old in config}
    translated |= {"model_type": "glm", "architectures": ["GlmForCausalLM"], "tie_word_embeddings": False}
    translated["rope_parameters"] = _rope_parameters(config, generation)
    if generation == CHATGLM3 and translated.get("vocab_size") == _CHATGLM3_VOCABULARY:
        translated["eos_token_id"] = _CHATGLM3_END_TOKENS
    # GlmConfig's own defaults for these two are GLM-4's.
    return {"eos_token_id": 2, "pad_token_id": 0} | translated


def check_generation(generation: str | None, possible: tuple[str, ...], config: dict[str, Any]) -> None:
    """Raise a `UserError` where a generation is asked for that a config's fields cannot be of."""
    if generation is None or generation in possible:
        return
    name = config.get("_name_or_path")
    raise UserError(
        f"The config{f' of {name}' if name else ''} is of {' or '.join(possible)} by its fields, but "
        f"generation={generation!r} was asked for: leave that argument out, or give the folder of that generation."
    )


def _recorded_generation(config: dict[str, Any]) -> str | None:
    """Return the generation of the recorded name, or GLM-4 by its vocabulary, which no other generation has."""
    generation = generation_of_name(config.get("_name_or_path"))
    if generation in _POSSIBLE_GENERATIONS:
        return generation
    return GLM4 if config.get("padded_vocab_size") == _GLM4_VOCABULARY else None


def _refuse_other_networks(config: dict[str, Any]) -> None:
    for name, published in _PUBLISHED.items():
        if config.get(name, published) != published:
            raise UserError(
                f"The config says {name}: {config[name]}, but ChatGLM2, ChatGLM3 and GLM-4 have {name}: {published}; "
                "this is another network, which glm_peft does not know."
            )


def _rope_parameters(config: dict[str, Any], generation: str | None) -> dict[str, Any]:
    """Return the rotary parameters that `rope_ratio` stands for."""
    ratio = config.get("rope_ratio") or 1
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return parameters
    if generation is None:
        raise UserError(
            f"The config has rope_ratio {ratio}, which ChatGLM2 reads differently from ChatGLM3 and GLM-4, and its "
            f"_name_or_path ({config.get('_name_or_path')!r}) names none of them: say which with "
            "generation='chatglm2', 'chatglm3' or 'glm4' (--chat_format on the command line)."
        )
    # ChatGLM2-6B-32k divides the positions by the ratio, the later generations multiply theta by it.
    if generation == CHATGLM2:
        return parameters | {"rope_type": "linear", "factor": float(ratio)}
    return parameters | {"rope_theta": 10000.0 * ratio}
