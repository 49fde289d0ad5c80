"""Compute fingerprints of a base's config, weights and tokenizer that do not depend on the layout of their files."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.models.unwrapping import base_of

_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "max_position_embeddings",
    "tie_word_embeddings",
    "pad_token_id",
    "mask_token_id",
    "gmask_token_id",
)
_ROPE_FIELDS = ("rope_theta", "rope_type", "partial_rotary_factor", "factor")
# Full-width forms, digits, blanks, line feeds and rare characters: where tokenizers differ beside their vocabulary.
_PROBE = "Ａ裤型，A-line skirt 1234567！  two  blanks\n\ttab 😀 naïve ﬁ ２０２４年 [gMASK] people'll"
_SAMPLED_WEIGHTS = 24
_INSIDE = re.compile(r"\.(lora|ia3)_|\.ranknum\.")  # parameters of an adapter inside the base's layers


def describe_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config that decide what the network computes, whichever layout it was read from."""
    fields = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    ends = config.eos_token_id
    # The published configs say one end token; which more there are depends on the generation.
    fields["eos_token_id"] = ends[0] if isinstance(ends, list) else ends
    # Glm has RMS norms, ChatGLM-6B layer norms, and each class has a name of its own for their epsilon.
    fields["norm_eps"] = getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
    fields |= {name: rope.get(name) for name in _ROPE_FIELDS}
    return {name: value for name, value in sorted(fields.items()) if value is not None}


def digest_config(fields: Mapping[str, Any]) -> str:
    """Return the sha256 of the fields that `describe_config` gives."""
    return _digest(json.dumps(fields, sort_keys=True))


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of a tokenizer's vocabulary, special ids and the ids that it gives a probing text."""
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * (1 + max(vocabulary.values(), default=0))
    for token, index in vocabulary.items():
        tokens[index] = token
    # The vocabulary alone does not tell: the same file gives other ids when another class reads it.
    ids = tokenizer(_PROBE, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer("")["input_ids"]]
    return _digest("\0".join([*tokens, *map(str, ids), *map(str, special)]))


def sample_weights(model: PreTrainedModel | PeftModel) -> dict[str, list[float]]:
    """
    Sample three values of each of some parameters of the base, which tell it from another one of the same sizes.

    Quantized parameters are left out, and those that are sharded into other processes or on the meta device.
    """
    parameters = _without_adapter(dict(base_of(model).named_parameters()))
    # A fixed seed over sorted names: training and prediction look at the same parameters.
    names = random.Random(0).sample(sorted(parameters), min(_SAMPLED_WEIGHTS, len(parameters)))
    held = {name: parameters[name].detach() for name in sorted(names) if not parameters[name].is_meta}
    return {
        name: [float(value.reshape(-1)[value.numel() * quarter // 4]) for quarter in (1, 2, 3)]
        for name, value in held.items()
        if value.is_floating_point() and value.numel()
    }


def _without_adapter(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the base's own parameters by the names that they have where no adapter is inside."""
    own = {name: value for name, value in parameters.items() if not _INSIDE.search(name)}
    return {name.replace(".base_layer.", "."): value for name, value in own.items()}  # as LoRA wraps a layer


def digest_rows(rows: Iterable[Any]) -> str:
    """Return the sha256 of rows as lines of JSON, for a dataset of the Hub, which is no file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
