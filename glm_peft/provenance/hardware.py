"""Describe the device that a run used and what it cost there; names of machines are left out."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # of training alone
    from transformers import TrainingArguments

RUNTIMES = {"train_runtime": "train", "eval_runtime": "evaluate", "predict_runtime": "predict"}
"""The task whose seconds a result holds, by the result's name."""

_CPU_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


def describe_hardware(training_args: "TrainingArguments") -> dict[str, Any]:
    """Return the name and kind of the device, the number of processes, and the backend, as `MULTI_GPU` or `FSDP`."""
    device = training_args.device
    backend = training_args.distributed_state.distributed_type.value
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _name_cpu(),
        "kind": device.type,
        "processes": training_args.world_size,
        "engine": backend,
    }
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()  # without which a CPU's times cannot be compared
    # Accelerate's launcher hands its configuration on in the environment.
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if backend == "DEEPSPEED" else None
    if stage and stage.isdigit():
        found["zero_stage"] = int(stage)
    return found


def measure_cost(results: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the seconds of each task, and the most memory of this process until now in bytes.

    Args:
        results: the metrics of the run, of which those ending in `_runtime` are read.
    """
    seconds = {task: results[name] for name, task in RUNTIMES.items() if name in results}
    named = [value for name, value in results.items() if re.fullmatch(r"eval_\w+_runtime", name)]
    seconds |= {"evaluate": sum(named)} if named else {}  # where there are several datasets for evaluation
    return {"seconds": seconds, "peak_memory": _peak_memory()} if seconds else {}


def _peak_memory() -> dict[str, int]:
    """Return the peaks of resident memory, as the system counts it, and of a GPU's, as torch's allocator does."""
    resident = peak_resident()
    found = {} if resident is None else {"resident_bytes": resident}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return found


def peak_resident() -> int | None:
    """Return the most bytes of this process that were resident, or `None` on Windows, which has no such count."""
    # On Linux `ru_maxrss` begins at the peak of the process that started this one, such as a launcher.
    if measured := _read_first(_PEAK, "/proc/self/status"):
        return int(measured) * 1024
    if sys.platform == "win32":
        return None
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _name_cpu() -> str:
    return " ".join((_read_first(_CPU_NAME, "/proc/cpuinfo") or platform.machine() or "CPU").split())


def _read_first(pattern: re.Pattern[str], file: str) -> str | None:
    """Return what the pattern finds first in a file of Linux, or `None` where there is neither."""
    try:
        found = pattern.search(Path(file).read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None
