"""By what a base, its tokenizer and a file are known again, wherever they lie and in whatever form."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.base_model import hub_arguments
from glm_peft.models.generations import CHATGLM, GLM4
from glm_peft.models.tokenization_common import read_json_beside, recorded_generation
from glm_peft.tuners import base_of

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
_GLM4_VOCABULARY = 151552
_CHUNK = 1 << 24
_INSIDE = re.compile(r"\.(lora|ia3)_|\.ranknum\.")  # of an adapter


def find_generation(model_args: Any) -> str | None:
    """
    The generation of a base by its files, or by `chat_format` where they do not say it; `None` where nothing does.

    Args:
        model_args: `model_name_or_path`, and maybe `model_revision`, `cache_dir` and `chat_format`.
    """
    name, hub = model_args.model_name_or_path, hub_arguments(model_args)
    try:
        config = read_json_beside(name, "config.json", **hub)
        said = recorded_generation(read_json_beside(name, "tokenizer_config.json", **hub), config)
    except (OSError, ValueError):
        return None  # loading the base says what is wrong
    chat_format = getattr(model_args, "chat_format", None)
    return said or generation_by_fields(config) or (None if chat_format == "plain" else chat_format)


def generation_by_fields(config: Mapping[str, Any]) -> str | None:
    """The one generation that has such fields in its `config.json`; ChatGLM2 and ChatGLM3 cannot be told apart."""
    if config.get("model_type") == "glm4" or _GLM4_VOCABULARY in (
        config.get("padded_vocab_size"),
        config.get("vocab_size"),
    ):
        return GLM4
    return CHATGLM if {"position_encoding_2d", "inner_hidden_size"} & config.keys() else None


def describe_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config makes the network and its ids, the same in the published layout and in transformers' own."""
    fields = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    ends = config.eos_token_id
    # The published configs say one end token; which more there are depends on the generation.
    fields["eos_token_id"] = ends[0] if isinstance(ends, list) else ends
    fields["norm_eps"] = getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
    fields |= {name: rope.get(name) for name in _ROPE_FIELDS}
    return {name: value for name, value in sorted(fields.items()) if value is not None}


def digest_config(fields: Mapping[str, Any]) -> str:
    """The sha256 of what `describe_config` gives."""
    return _digest(json.dumps(fields, sort_keys=True))


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of vocabulary, special ids and how a text is cut, whatever file the tokenizer was read from."""
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * (1 + max(vocabulary.values(), default=0))
    for token, index in vocabulary.items():
        tokens[index] = token
    ids = tokenizer(_PROBE, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer("")["input_ids"]]
    return _digest("\0".join([*tokens, *map(str, ids), *map(str, special)]))


def sample_weights(model: PreTrainedModel | PeftModel) -> dict[str, list[float]]:
    """
    Three numbers of each of some parameters of the base, by which another base of the same sizes is told.

    Quantized parameters are left out, as are those that this process does not hold.
    """
    parameters = _without_adapter(dict(base_of(model).named_parameters()))
    names = random.Random(0).sample(sorted(parameters), min(_SAMPLED_WEIGHTS, len(parameters)))
    held = {name: parameters[name].detach() for name in sorted(names) if not parameters[name].is_meta}
    return {
        name: [float(value.reshape(-1)[value.numel() * quarter // 4]) for quarter in (1, 2, 3)]
        for name, value in held.items()
        if value.is_floating_point() and value.numel()
    }


def _without_adapter(parameters: dict[str, Any]) -> dict[str, Any]:
    """The base's own, by the names that they have where no adapter is inside."""
    own = {name: value for name, value in parameters.items() if not _INSIDE.search(name)}
    return {name.replace(".base_layer.", "."): value for name, value in own.items()}


def digest_file(file: str | Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_rows(rows: Iterable[Any]) -> str:
    """The sha256 of rows as lines of JSON, for those that come from no file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
