"""Describe what the answers of a run depend on, so that only the same run goes on with a stopped one."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from glm_peft.adapters.trained_state import gather_trained
from glm_peft.arguments.model import ModelArguments
from glm_peft.data import GenerationFeatures
from glm_peft.prediction.generation_settings import GenerationSettings

_DRAWING = ("top_p", "top_k", "temperature", "seed", "batch_size", "max_batch_tokens")
_WEIGHTS, _CONFIGS = (".safetensors", ".bin"), ("config.json", "adapter_config.json")
_CHUNK = 1 << 24
# Values of a parameter that are hashed: a large one takes too long, and training changes all of its values.
_MOST_NUMBERS = 1 << 20


def describe_run(
    model_args: ModelArguments,
    features: GenerationFeatures,
    settings: GenerationSettings,
    model: PeftModel | PreTrainedModel | None = None,
) -> dict[str, Any]:
    """
    Map the name of each thing that the answers depend on to its value, or to a digest of it.

    Args:
        model: its trained parameters, in memory, count instead of the adapter's files.
    """
    # Batches count only where answers are drawn: greedy ones do not depend on them.
    kept = [name for name in asdict(settings) if settings.do_sample or name not in _DRAWING]
    return {
        # By names and sizes: reading a base of 12 GB takes minutes.
        "base": _describe_source(model_args.model_name_or_path, with_content=False),
        "base's revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "quantization_bit": model_args.quantization_bit,
        "adapter": _digest_trained(model) if model else _describe_source(model_args.adapter_name_or_path, True),
        "digest of the prompts' ids": _digest_prompts(features),
        **{name: getattr(settings, name) for name in kept},
    }


def describe_settings(settings: GenerationSettings) -> str:
    """Describe the settings that have an effect, for the log."""
    search = f"{settings.num_beams} beams" if settings.num_beams > 1 else "greedy"
    if settings.do_sample:
        search = ", ".join(f"{name} {getattr(settings, name)}" for name in ("top_p", "top_k", "temperature", "seed"))
        search = f"drawn with {search}" + (f", {settings.num_beams} beams" if settings.num_beams > 1 else "")
    batches = f"{settings.batch_size} rows a batch" if settings.batch_size else "as many rows a batch as fit in memory"
    if settings.max_batch_tokens:
        batches = f"at most {settings.max_batch_tokens} tokens a batch"
    return f"at most {settings.max_new_tokens} new tokens a row; {search}; {batches}"


def _describe_source(name_or_path: str | None, with_content: bool) -> str | None:
    if name_or_path is None or not Path(name_or_path).is_dir():
        return name_or_path
    digest = hashlib.sha256()
    for path in sorted(Path(name_or_path).iterdir()):
        if path.suffix not in _WEIGHTS and path.name not in _CONFIGS:
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if with_content:
            _update(digest, path)
    return f"{name_or_path} (sha256 {digest.hexdigest()[:12]})"


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)


def _digest_trained(model: PeftModel | PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, value in gather_trained(model).items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.flatten()[:_MOST_NUMBERS].float().cpu().numpy().tobytes())
    return f"what was trained (sha256 {digest.hexdigest()[:12]})"


def _digest_prompts(features: GenerationFeatures) -> str:
    return hashlib.sha256(json.dumps(features.dataset["input_ids"][:]).encode()).hexdigest()[:12]
