"""Random weights under the published names: which tensors a generation has, and writing them shard by shard."""

import hashlib
import json
import math
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

Shape = tuple[int, ...]
FILE_PATTERNS = {"safetensors": "model{suffix}.safetensors", "bin": "pytorch_model{suffix}.bin"}
ROPE_THETA = 10000.0


def chatglm_shapes(
    vocab_size: int, hidden_size: int, ffn_size: int, num_layers: int, num_heads: int
) -> dict[str, Shape]:
    """The tensors of ChatGLM-6B: fused q, k, v per head, biases everywhere but in the head, rotary buffers."""
    linear = {
        "attention.query_key_value": (3 * hidden_size, hidden_size),
        "attention.dense": (hidden_size, hidden_size),
        "mlp.dense_h_to_4h": (ffn_size, hidden_size),
        "mlp.dense_4h_to_h": (hidden_size, ffn_size),
    }
    shapes: dict[str, Shape] = {"transformer.word_embeddings.weight": (vocab_size, hidden_size)}
    for layer in (f"transformer.layers.{i}" for i in range(num_layers)):
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{name}.weight": (hidden_size,), f"{layer}.{name}.bias": (hidden_size,)}
        shapes[f"{layer}.attention.rotary_emb.inv_freq"] = (hidden_size // num_heads // 4,)
    final = {f"transformer.final_layernorm.{part}": (hidden_size,) for part in ("weight", "bias")}
    return shapes | final | {"lm_head.weight": (vocab_size, hidden_size)}


def chatglm2_shapes(
    vocab_size: int,
    hidden_size: int,
    ffn_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, Shape]:
    """The tensors of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B: grouped keys and values, gate and up in one matrix."""
    qkv_size = (num_heads + 2 * num_kv_heads) * head_dim
    shapes: dict[str, Shape] = {"transformer.embedding.word_embeddings.weight": (vocab_size, hidden_size)}
    for layer in (f"transformer.encoder.layers.{i}" for i in range(num_layers)):
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden_size,),
            f"{layer}.self_attention.query_key_value.weight": (qkv_size, hidden_size),
            f"{layer}.self_attention.query_key_value.bias": (qkv_size,),
            f"{layer}.self_attention.dense.weight": (hidden_size, num_heads * head_dim),
            f"{layer}.post_attention_layernorm.weight": (hidden_size,),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * ffn_size, hidden_size),
            f"{layer}.mlp.dense_4h_to_h.weight": (hidden_size, ffn_size),
        }
    return shapes | {
        "transformer.encoder.final_layernorm.weight": (hidden_size,),
        "transformer.output_layer.weight": (vocab_size, hidden_size),
        "transformer.rotary_pos_emb.inv_freq": (head_dim // 4,),
    }


def random_tensor(name: str, shape: Shape, std: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """
    One tensor by its name: norms are 1 (weight) and 0 (bias), rotary buffers their frequencies, the rest normal.

    The numbers depend on `seed` and `name` alone, so they are the same however the model is cut into shards.
    ChatGLM-6B ties its head to its embeddings, so the two get the same numbers.
    """
    if name.endswith("inv_freq"):
        return (ROPE_THETA ** -(torch.arange(shape[0]) / shape[0])).to(torch.float16)
    if "norm" in name:
        return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
    tied = "transformer.word_embeddings.weight" if name == "lm_head.weight" else name
    digest = hashlib.sha256(f"{seed}:{tied}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator).to(dtype)


def default_std(hidden_size: int) -> float:
    """0.02 at the published width of 4096, and the same spread of the activations and logits at every other width."""
    return 0.02 * math.sqrt(4096 / hidden_size)


def write_weights(
    folder: Path,
    shapes: dict[str, Shape],
    *,
    std: float,
    seed: int,
    dtype: torch.dtype,
    file_format: str,
    max_shard_size: str,
) -> list[Path]:
    """
    Writes the tensors of `shapes` to one file, or to shards with an index; no more than one shard is held in memory.

    Args:
        folder: An existing folder.
        shapes: The shape of each tensor by its published name.
        std: Standard deviation of the matrices and biases.
        seed: Seed of the numbers.
        dtype: Type of the tensors; rotary buffers are float16 in any case.
        file_format: `safetensors` or `bin` (a pickle, as the older repositories have).
        max_shard_size: Largest size of a file, such as `500MB` or `2GB`.

    Returns:
        The paths of the weight files, in the order of the shards.
    """
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    pattern = FILE_PATTERNS[file_format]
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: random_tensor(name, shapes[name], std, seed, dtype) for name in names}
        if file_format == "bin":
            torch.save(shard, folder / filename)
        else:
            save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        index_name = pattern.format(suffix="") + ".index.json"
        (folder / index_name).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [folder / filename for filename in split.filename_to_tensors]
