"""Short training runs of a two-layer model, typed in this process or in one that can be killed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glm_peft import train

PROJECT = Path(__file__).parents[1]
ROWS = [
    {
        "content": f"类型#{kind}*颜色#{colour}",
        "summary": f"这条{kind}是{colour}的" + "，很好看" * (len(kind) * len(colour)),
    }
    for kind in ("裤", "裙", "衬衫", "外套")
    for colour in ("白色", "黑色", "米色调")
]
FIXED = "--num_virtual_tokens 4 --max_source_length 64 --max_target_length 32 --use_cpu true --disable_tqdm true "
FIXED += "--per_device_train_batch_size 4 --per_device_eval_batch_size 6 --max_new_tokens 4 --learning_rate 0.3 "
FIXED += "--logging_steps 2 --do_train"

# For what is refused or settled before anything is read.
NEEDED = [
    "--model_name_or_path",
    "base",
    "--output_dir",
    "out",
    "--do_train",
    "--train_file",
    "train.json",
    "--use_cpu",
]


def training_words(base: Path, output_dir: Path, *more: str) -> list[str]:
    """The words of a command that trains on twelve rows: three steps an epoch."""
    data_file = output_dir.parent / "rows.json"
    data_file.parent.mkdir(parents=True, exist_ok=True)
    if not data_file.exists():
        data_file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    files = ["--train_file", str(data_file), "--validation_file", str(data_file)]
    return ["--model_name_or_path", str(base), "--output_dir", str(output_dir), *files, *FIXED.split(), *more]


def run(words: list[str]) -> None:
    """The command in this process, which is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words])
        train.main()


def log_of(checkpoint: Path) -> list[dict[str, float]]:
    """What was logged until the checkpoint, but for times."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [
        {name: entry[name] for name in entry if "runtime" not in name and "second" not in name} for entry in history
    ]


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Prefix, encoder, optimizer and schedule of a checkpoint, flat."""
    found: dict[str, Any] = dict(load_file(checkpoint / "adapter_model.safetensors"))
    found |= load_file(checkpoint / "prefix_encoder.safetensors")
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for number, values in optimizer["state"].items():
        found |= {f"{number}.{name}": value for name, value in values.items()}
    return found | {"schedule": str(torch.load(checkpoint / "scheduler.pt", weights_only=True))}


def assert_same_end(run: Path, expected: Path, checkpoint: str) -> None:
    """The adapter, byte for byte; the optimizer; every logged number."""
    files = [folder / "adapter_model.safetensors" for folder in (run, expected)]
    assert files[0].read_bytes() == files[1].read_bytes()
    found, wanted = tensors_of(run / checkpoint), tensors_of(expected / checkpoint)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name
    assert log_of(run / checkpoint) == log_of(expected / checkpoint)
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (run, expected)]
    assert results[0]["train_loss"] == results[1]["train_loss"]
