"""The configurations of the five layouts, field by field as published, with the sizes of `ModelOptions`."""

from typing import Any

from tiny_options import ModelOptions
from tiny_tokenizers import TokenizerFacts
from tiny_weights import ROPE_THETA
from transformers import Glm4Config

PUBLISHED_NAMES = {"chatglm2": "THUDM/chatglm2-6b", "chatglm3": "THUDM/chatglm3-6b", "glm4": "THUDM/glm-4-9b-chat"}
SEQUENCE_LENGTHS = {"chatglm2": 32768, "chatglm3": 8192, "glm4": 131072, "glm4_0414": 32768}
TRANSFORMERS_VERSIONS = {"chatglm2": "4.27.1", "chatglm3": "4.30.2", "glm4": "4.44.0"}
END_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def _auto_map(*auto_classes: str) -> dict[str, str]:
    model = "modeling_chatglm.ChatGLMForConditionalGeneration"
    return {"AutoConfig": "configuration_chatglm.ChatGLMConfig", **dict.fromkeys(auto_classes, model)}


def chatglm_config(options: ModelOptions, facts: TokenizerFacts, vocab_size: int) -> dict[str, Any]:
    """The `config.json` of ChatGLM-6B with these sizes."""
    return {
        "_name_or_path": "THUDM/chatglm-6b",
        "architectures": ["ChatGLMModel"],
        "auto_map": _auto_map("AutoModel", "AutoModelForSeq2SeqLM"),
        "bos_token_id": facts.ids["<sop>"],
        "eos_token_id": facts.ids["<eop>"],
        "mask_token_id": facts.ids["[MASK]"],
        "gmask_token_id": facts.ids["[gMASK]"],
        "pad_token_id": facts.ids["<pad>"],
        "hidden_size": options.hidden_size,
        "inner_hidden_size": options.ffn_size,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 2048,
        "model_type": "chatglm",
        "num_attention_heads": options.num_heads,
        "num_layers": options.num_layers,
        "position_encoding_2d": True,
        "torch_dtype": options.dtype,
        "transformers_version": "4.23.1",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def chatglm2_config(options: ModelOptions, facts: TokenizerFacts, vocab_size: int) -> dict[str, Any]:
    """The `config.json` of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B with these sizes."""
    is_glm4 = options.generation == "glm4"
    config = {
        "_name_or_path": PUBLISHED_NAMES[options.generation],
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": _auto_map("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": options.ffn_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": options.hidden_size,
        "kv_channels": options.head_dim,
        "layernorm_epsilon": 1.5625e-07 if is_glm4 else 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": options.num_kv_heads,
        "num_attention_heads": options.num_heads,
        "num_layers": options.num_layers,
        "original_rope": True,
        "padded_vocab_size": vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": SEQUENCE_LENGTHS[options.generation],
        "use_cache": True,
        "torch_dtype": options.dtype,
        "transformers_version": TRANSFORMERS_VERSIONS[options.generation],
        "tie_word_embeddings": False,
        "eos_token_id": [facts.ids[name] for name in END_TOKENS] if is_glm4 else facts.ids["</s>"],
        "pad_token_id": facts.ids["<|endoftext|>" if is_glm4 else "<unk>"],
    }
    if is_glm4:
        config["num_hidden_layers"] = options.num_layers
    if is_glm4 or options.rope_ratio is not None:
        config["rope_ratio"] = 500 if options.rope_ratio is None else options.rope_ratio
    return config


def glm4_0414_config(options: ModelOptions, facts: TokenizerFacts, vocab_size: int) -> Glm4Config:
    """The stock configuration of GLM-4-0414 with these sizes."""
    rope_theta = ROPE_THETA * (1.0 if options.rope_ratio is None else options.rope_ratio)
    return Glm4Config(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.ffn_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=SEQUENCE_LENGTHS["glm4_0414"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, "partial_rotary_factor": 0.5},
        eos_token_id=[facts.ids[name] for name in END_TOKENS],
        pad_token_id=facts.ids["<|endoftext|>"],
        architectures=["Glm4ForCausalLM"],
        dtype=options.dtype,
    )
