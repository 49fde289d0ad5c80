"""
Both networks once more, as plain tensor arithmetic on the published weights, written from FORMATS sections 2 and 3.

One sequence at a time, without padding, cache or masks of tensors, in float64: what the models are compared with.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, linear, silu

Weights = dict[str, torch.Tensor]


def read_model(folder: Path) -> tuple[Weights, dict[str, Any]]:
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    return weights, json.loads((folder / "config.json").read_text())


def plain_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """[length, vocabulary], of whichever of the two networks the config describes."""
    weights, config = read_model(folder)
    network = _glm_logits if "multi_query_group_num" in config else _chatglm_logits
    return network(weights, config, ids)


def plain_greedy(folder: Path, ids: list[int], steps: int) -> list[int]:
    """Every step computes the whole sequence again."""
    for _ in range(steps):
        ids = [*ids, int(plain_logits(folder, ids)[-1].argmax())]
    return ids[-steps:]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[heads, length, d] each, visible [length, length] -> [length, heads * d]."""
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    mixed = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ value
    return mixed.transpose(0, 1).flatten(1)


def position_rows(config: dict[str, Any], ids: list[int]) -> tuple[list[int], list[int]]:
    """ChatGLM-6B's two positions of every token."""
    sop = ids.index(config["bos_token_id"])
    prompt = ids[:sop]
    mask_id = next(id_ for id_ in (config["gmask_token_id"], config["mask_token_id"]) if id_ in prompt)
    answer = len(ids) - sop
    return [*range(sop), *[prompt.index(mask_id)] * answer], [*[0] * sop, *range(1, answer + 1)]


def _turn_halves(states: torch.Tensor, rows: tuple[list[int], list[int]]) -> torch.Tensor:
    """[heads, length, d]: a half of each head by each row; number j is paired with j + d / 4."""
    quarter = states.shape[-1] // 4
    frequencies = (10000.0 ** (-torch.arange(quarter) / quarter)).half().double()
    turned = []
    for part, row in zip(states.chunk(2, dim=-1), rows, strict=True):
        angles = torch.tensor(row)[:, None] * frequencies
        first, second = part[..., :quarter], part[..., quarter:]
        turned += [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned, dim=-1)


def _chatglm_logits(weights: Weights, config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    heads, length, rows = config["num_attention_heads"], len(ids), position_rows(config, ids)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[:, : ids.index(config["bos_token_id"])] = True

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        name = f"transformer.{name}"
        eps = config["layernorm_epsilon"]
        return layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def project(name: str, states: torch.Tensor) -> torch.Tensor:
        return linear(states, weights[f"transformer.{name}.weight"], weights[f"transformer.{name}.bias"])

    states = weights["transformer.word_embeddings.weight"][ids]
    for layer in (f"layers.{index}" for index in range(config["num_layers"])):
        normed = norm(f"{layer}.input_layernorm", states)
        fused = project(f"{layer}.attention.query_key_value", normed).view(length, heads, -1).transpose(0, 1)
        query, key, value = fused.chunk(3, dim=-1)
        mixed = _attend(_turn_halves(query, rows), _turn_halves(key, rows), value, visible)
        states = 56**0.5 * normed + project(f"{layer}.attention.dense", mixed)
        normed = norm(f"{layer}.post_attention_layernorm", states)
        inner = gelu(project(f"{layer}.mlp.dense_h_to_4h", normed), approximate="tanh")
        states = 56**0.5 * normed + project(f"{layer}.mlp.dense_4h_to_h", inner)
    return norm("final_layernorm", states) @ weights["lm_head.weight"].T


def _glm_rotations(config: dict[str, Any], length: int) -> torch.Tensor:
    """[length, d / 4] angles; `rope_ratio` divides ChatGLM2's positions and multiplies the others' theta."""
    pairs = config["kv_channels"] // 4
    theta, positions, ratio = 10000.0, torch.arange(length).double(), config.get("rope_ratio", 1)
    if "chatglm2" in config["_name_or_path"]:
        positions = positions / ratio
    else:
        theta *= ratio
    return positions[:, None] * theta ** (-torch.arange(pairs) / pairs)


def _turn_pairs(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[heads, length, d]: neighbours of the first half of each head are a pair, the second half stays."""
    turning, staying = states.chunk(2, dim=-1)
    even, odd = turning[..., ::2], turning[..., 1::2]
    pairs = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
    return torch.cat((torch.stack(pairs, dim=-1).flatten(-2), staying), dim=-1)


def _glm_logits(weights: Weights, config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    heads, groups, size = (config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    length, angles = len(ids), _glm_rotations(config, len(ids))
    visible = torch.ones(length, length, dtype=torch.bool).tril()

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        scale = (states.square().mean(dim=-1, keepdim=True) + config["layernorm_epsilon"]).rsqrt()
        return states * scale * weights[f"transformer.encoder.{name}.weight"]

    def project(name: str, states: torch.Tensor) -> torch.Tensor:
        name = f"transformer.encoder.{name}"
        return linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    states = weights["transformer.embedding.word_embeddings.weight"][ids]
    for layer in (f"layers.{index}" for index in range(config["num_layers"])):
        fused = project(f"{layer}.self_attention.query_key_value", norm(f"{layer}.input_layernorm", states))
        fused = fused.view(length, -1, size).transpose(0, 1)
        query, key, value = fused.split([heads, groups, groups])
        key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (_turn_pairs(key, angles), value))
        mixed = _attend(_turn_pairs(query, angles), key, value, visible)
        states = states + project(f"{layer}.self_attention.dense", mixed)
        inner = project(f"{layer}.mlp.dense_h_to_4h", norm(f"{layer}.post_attention_layernorm", states))
        gate, up = inner.chunk(2, dim=-1)
        states = states + project(f"{layer}.mlp.dense_4h_to_h", silu(gate) * up)
    return norm("final_layernorm", states) @ weights["transformer.output_layer.weight"].T
