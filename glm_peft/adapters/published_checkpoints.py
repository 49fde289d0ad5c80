"""Read and write published P-Tuning v2 checkpoints: `transformer.prefix_encoder.*`, alone or in a full model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding, apply_rotary_pos_emb

from glm_peft.errors import UserError
from glm_peft.models.folder_kind import PREFIX
from glm_peft.models.weight_files import read_tensors, read_weight_map

_PROJECTION = ("transform.0.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias")
_CHECKPOINT = "the checkpoint-N folder that the published training wrote"


@dataclass(frozen=True)
class PublishedPrefix:
    """
    A prefix as the published code keeps it, its keys not rotated.

    `weight` is the flat prefix [P, layers * 2 * kv]. `encoder` holds the parameters that it is computed from, under
    the names of PEFT's prefix encoder, or is `None` where PEFT's encoder has another form.
    """

    weight: torch.Tensor
    encoder: dict[str, torch.Tensor] | None


def read_published_prefix(folder: str | Path) -> PublishedPrefix:
    """
    Read the prefix out of a `checkpoint-N` folder: of the prefix alone or of the full model, in one file or sharded,
    pickle or safetensors. No code in a pickle is run, and no other tensor is read.

    Raises:
        UserError: there is no prefix in it, or a file is broken, holds something else than tensors, or tensors of
            other names and sizes than a prefix has.
    """
    # Some scripts save half precision; here a prefix is trained and kept in float32.
    encoder = {name: value.float() for name, value in _read_encoder(Path(folder)).items()}
    spoilt = [name for name, value in encoder.items() if not bool(value.isfinite().all())]
    if spoilt:
        raise UserError(
            f"The prefix in {folder} holds NaN or infinite values (in {spoilt[0]}), which spoil every answer: take an "
            "earlier checkpoint of that training."
        )
    return _apply_projection(encoder)


def read_published_sizes(folder: str | Path) -> tuple[int, int, int | None]:
    """
    Read how many virtual tokens a published prefix has, the parameters of each, and the hidden size of its
    projection, `None` where there is none that training can go on with.

    Raises:
        UserError: as `read_published_prefix` does, but for NaN and infinite values.
    """
    encoder = _read_encoder(Path(folder))
    num_virtual_tokens, width = encoder["embedding.weight"].shape
    if "transform.0.bias" not in encoder:
        return num_virtual_tokens, width, None
    hidden_size = len(encoder["transform.0.bias"]) if _has_form_of_peft(encoder) else None
    return num_virtual_tokens, len(encoder["transform.2.bias"]), hidden_size


def write_published_prefix(weight: torch.Tensor, base_config: dict[str, Any], folder: str | Path) -> None:
    """
    Write a flat prefix, its keys not rotated, as the published scripts save one without projection.

    Args:
        weight: [P, layers * 2 * kv].
        base_config: the fields of the base's `config.json`, to which the prefix's are added.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A pickle, as the published scripts read nothing else.
    torch.save({f"transformer.{PREFIX}embedding.weight": weight.contiguous()}, folder / "pytorch_model.bin")
    config = base_config | {"pre_seq_len": len(weight), "prefix_projection": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rotate_prefix_keys(weight: torch.Tensor, config: PreTrainedConfig, positions: int | None = None) -> torch.Tensor:
    """
    Rotate the keys of a flat prefix from the published positions to PEFT's.

    The published code counts the text from 0, PEFT from P: rotated forward by P, keys of a base with rotary positions
    are as far from the text as they were.

    Args:
        weight: [P, layers * 2 * kv], in the order layer, key or value, head, dimension.
        config: of the base.
        positions: how many positions forward, P where `None`; -P is the way back.
    """
    if config.model_type == "chatglm":
        return weight  # ChatGLM-6B neither rotates the keys of a prefix nor counts it
    states = weight.reshape(weight.shape[0], config.num_hidden_layers, 2, config.num_key_value_heads, -1)
    keys, values = states.permute(2, 1, 3, 0, 4)
    position_ids = torch.full((1, weight.shape[0]), positions or weight.shape[0])
    cos, sin = (part.double() for part in GlmRotaryEmbedding(config)(weight, position_ids))
    # In float32 a sine and its cosine are not of length 1 together, and the way back would not end where it began.
    length = torch.hypot(cos, sin)
    keys, _ = apply_rotary_pos_emb(keys.double(), keys.double(), cos / length, sin / length)
    return torch.stack([keys.to(weight.dtype), values]).permute(3, 1, 0, 2, 4).reshape(weight.shape)


def _read_encoder(folder: Path) -> dict[str, torch.Tensor]:
    """Read the parameters of a prefix by the names of PEFT's encoder, in the precision of the file."""
    files = sorted({file for name, file in read_weight_map(folder).items() if PREFIX in name})
    tensors = {name: value for file in files for name, value in read_tensors(file, PREFIX).items() if PREFIX in name}
    # Behind `prefix_encoder.` the published names are PEFT's, but for `trans`.
    encoder = {name.split(PREFIX, 1)[1].replace("trans.", "transform."): value for name, value in tensors.items()}
    if "embedding.weight" not in encoder:
        raise UserError(
            f"{folder} holds no P-Tuning v2 prefix (no parameter named …prefix_encoder.embedding.weight in its "
            f"weights): give {_CHECKPOINT}."
        )
    _check_names(encoder, folder)
    _check_shapes(encoder, folder)
    return encoder


def _check_names(encoder: dict[str, Any], folder: Path) -> None:
    """Require the embedding, and either nothing else or all of a projection, as dense floating-point tensors."""
    names = {"embedding.weight", *(_PROJECTION if any(name in encoder for name in _PROJECTION) else ())}
    if encoder.keys() != names:
        odd = ", ".join(sorted(encoder.keys() ^ names))
        raise UserError(
            f"The prefix encoder in {folder} has not the published parameters (missing or unknown: {odd}), so it "
            f"computes something else: give {_CHECKPOINT}."
        )
    for name, value in encoder.items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided):
            found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"{name} in {folder} is not a tensor of floating-point numbers but {found}: give {_CHECKPOINT}."
            )


def _check_shapes(encoder: dict[str, torch.Tensor], folder: Path) -> None:
    shapes = {name: tuple(value.shape) for name, value in encoder.items()}
    fits = len(shapes["embedding.weight"]) == 2 and 0 not in shapes["embedding.weight"]
    # A Linear's weight is [out, in]: embedding [P, a] -> first [h, a] -> second [L * 2 * kv, h].
    if fits and len(shapes) > 1:
        first, first_bias, second, second_bias = (shapes[name] for name in _PROJECTION)
        fits = len(first) == len(second) == 2 and first[1] == shapes["embedding.weight"][1] and second[1] == first[0]
        fits = fits and first_bias == first[:1] and second_bias == second[:1]
    if not fits:
        raise UserError(f"The parameters of the prefix in {folder} do not fit together ({shapes}): copy it again.")


def _has_form_of_peft(encoder: dict[str, torch.Tensor]) -> bool:
    """Whether a projection starts from an embedding as wide as one layer's keys, as ChatGLM-6B's and PEFT's do."""
    # ChatGLM2's and ChatGLM3's embedding has the full width of the prefix, before the projection as after it.
    return encoder["embedding.weight"].shape[1] < len(encoder["transform.2.bias"])


def _apply_projection(encoder: dict[str, torch.Tensor]) -> PublishedPrefix:
    embedding = encoder["embedding.weight"]
    if "transform.0.weight" not in encoder:
        return PublishedPrefix(embedding, encoder)
    # Without the published dropout of 0.1, which is for training alone.
    hidden = torch.tanh(embedding @ encoder["transform.0.weight"].T + encoder["transform.0.bias"])
    weight = hidden @ encoder["transform.2.weight"].T + encoder["transform.2.bias"]
    return PublishedPrefix(weight, encoder if _has_form_of_peft(encoder) else None)
