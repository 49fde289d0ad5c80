"""Published P-Tuning v2 checkpoints as prefixes for PEFT (FORMATS section 6)."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding, apply_rotary_pos_emb

from glm_peft.errors import UserError

_PREFIX = "prefix_encoder."
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class PublishedPrefix:
    """
    A prefix as the published code keeps it, keys not rotated.

    `weight` is the flat prefix [P, layers * 2 * kv]. `encoder` holds the parameters that made it, under the names of
    PEFT's prefix encoder, where PEFT's has that form; otherwise it is `None`.
    """

    weight: torch.Tensor
    encoder: dict[str, torch.Tensor] | None


def is_published_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds weights, but not in the form of a PEFT adapter."""
    folder = Path(folder)
    return not (folder / "adapter_config.json").exists() and bool(_weight_files(folder))


def read_published_prefix(folder: str | Path) -> PublishedPrefix:
    """
    Read the prefix out of a `checkpoint-N` folder: prefix only or whole model, single or sharded, pickle or
    safetensors. Pickles are read as plain tensors only.

    Raises:
        UserError: a file holds something else than tensors, or there is no prefix in it.
    """
    folder = Path(folder)
    encoder: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        encoder |= {name.split(_PREFIX, 1)[1]: value for name, value in _read_prefix_tensors(file).items()}
    if "embedding.weight" not in encoder:
        raise UserError(
            f"{folder} holds no P-Tuning v2 prefix (no parameter named …prefix_encoder.embedding.weight in "
            f"{', '.join(file.name for file in _weight_files(folder)) or 'any weights file'}): give the checkpoint-N "
            "folder that the published training wrote."
        )
    encoder = {name.replace("trans.", "transform."): value.float() for name, value in encoder.items()}
    return _apply_projection(encoder)


def write_published_prefix(weight: torch.Tensor, base_config: dict[str, Any], folder: str | Path) -> None:
    """
    Write a flat prefix, keys not rotated, as the published scripts save one without projection.

    Args:
        weight: [P, layers * 2 * kv].
        base_config: the fields of the base's `config.json`, to which the prefix's are added.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"transformer.{_PREFIX}embedding.weight": weight.contiguous()}, folder / "pytorch_model.bin")
    config = base_config | {"pre_seq_len": len(weight), "prefix_projection": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rotate_prefix_keys(weight: torch.Tensor, config: PreTrainedConfig, positions: int | None = None) -> torch.Tensor:
    """
    Move a flat prefix between the published positions and PEFT's.

    The published code counts the text from 0, PEFT from P, so the keys of a base with rotary positions have to be
    turned by P positions. ChatGLM-6B neither rotates nor counts its prefix: there nothing changes.

    Args:
        weight: [P, layers * 2 * kv], in the order layer, key or value, head, number.
        config: of the base.
        positions: how far, P where `None`; -P is the way back.
    """
    if config.model_type == "chatglm":
        return weight
    states = weight.view(weight.shape[0], config.num_hidden_layers, 2, config.num_key_value_heads, -1)
    keys, values = states.permute(2, 1, 3, 0, 4)
    position_ids = torch.full((1, weight.shape[0]), positions or weight.shape[0])
    cos, sin = GlmRotaryEmbedding(config)(weight, position_ids)
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    return torch.stack([keys, values]).permute(3, 1, 0, 2, 4).reshape(weight.shape)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold weights: the shards that an index names, or the single file."""
    for name in _SINGLE_FILES:
        if (folder / f"{name}.index.json").exists():
            index = json.loads((folder / f"{name}.index.json").read_text(encoding="utf-8"))
            return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
        if (folder / name).exists():
            return [folder / name]
    return []


def _read_prefix_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys() if _PREFIX in name}  # noqa: SIM118
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{file} is not a file of plain tensors ({type(error).__name__}), so it is not read and nothing in it is "
            "run: give the pytorch_model.bin or model.safetensors that the published training wrote."
        ) from error
    return {name: value for name, value in state.items() if _PREFIX in name}


def _apply_projection(encoder: dict[str, torch.Tensor]) -> PublishedPrefix:
    """PEFT's own encoder has this form only where the embedding is as wide as one layer's keys (ChatGLM-6B)."""
    embedding = encoder["embedding.weight"]
    if "transform.0.weight" not in encoder:
        return PublishedPrefix(embedding, encoder)
    hidden = torch.tanh(embedding @ encoder["transform.0.weight"].T + encoder["transform.0.bias"])
    weight = hidden @ encoder["transform.2.weight"].T + encoder["transform.2.bias"]
    return PublishedPrefix(weight, encoder if embedding.shape[1] < weight.shape[1] else None)
