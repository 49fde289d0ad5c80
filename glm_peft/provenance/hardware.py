"""On what a run ran, and what it took there; no names of machines."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

RUNTIMES = {"train_runtime": "train", "eval_runtime": "evaluate", "predict_runtime": "predict"}
"""Of the results: whose seconds they are."""

_OFFLOAD = tuple(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE" for part in ("PARAM", "OPTIMIZER"))
_CPU_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)


def describe_hardware(training_args: TrainingArguments) -> dict[str, Any]:
    """Name and kind of the device, number of processes, and what joins them, such as `MULTI_GPU` or `FSDP`."""
    device = training_args.device
    engine = training_args.distributed_state.distributed_type.value
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _name_cpu(),
        "kind": device.type,
        "processes": training_args.world_size,
        "engine": engine,
    }
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if engine == "DEEPSPEED" else None
    if stage and stage.isdigit():
        found |= {"zero_stage": int(stage), "offload": any(os.environ.get(name) == "cpu" for name in _OFFLOAD)}
    return found


def measure_cost(results: Mapping[str, Any]) -> dict[str, Any]:
    """
    Seconds by task, and the most memory of this process until now in bytes.

    Args:
        results: of the run, with its `…_runtime`.
    """
    seconds = {task: results[name] for name, task in RUNTIMES.items() if name in results}
    named = [value for name, value in results.items() if re.fullmatch(r"eval_\w+_runtime", name)]
    seconds |= {"evaluate": sum(named)} if named else {}  # of several data sets
    return {"seconds": seconds, "peak_memory": _peak_memory()} if seconds else {}


def _peak_memory() -> dict[str, int]:
    """Resident memory as the system counts it, and of a GPU what torch's tensors took."""
    found = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _name_cpu() -> str:
    try:
        named = _CPU_NAME.search(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        named = None
    return " ".join(named[1].split()) if named else platform.machine() or "CPU"
