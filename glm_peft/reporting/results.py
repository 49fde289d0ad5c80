"""Format the results at the end of a run and the sections of a report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_peft.reporting.files import write_atomically

if TYPE_CHECKING:  # see glm_peft.reporting.log
    import torch

_LARGE = 1e9  # from here on numbers are shown by their power of ten, as operations are counted in 1e15


def print_section(title: str, body: str) -> None:
    """Print a titled part of a report on stdout."""
    print(f"\n{title}\n{body}", flush=True)  # in order with the log on stderr, into one file or pipe


def describe_device(device: "torch.device") -> str:
    """Return a text such as `cpu`, or a GPU's name and memory."""
    if device.type != "cuda":
        return str(device)
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"


def describe_precision(dtype: "torch.dtype", kept: "torch.dtype | None", quantization_bit: int | None) -> str:
    """Return a base's precision as text, such as `torch.bfloat16, quantized to 4 bits`."""
    quantized = f"quantized to {quantization_bit} bits" if quantization_bit else "not quantized"
    return f"{describe_dtype(dtype, kept)}, {quantized}"


def describe_dtype(dtype: "torch.dtype", kept: "torch.dtype | None") -> str:
    """Return in which dtype a base computes, and in which its weights are `kept` where that is another one."""
    return f"{dtype} with weights kept in {kept}" if kept else str(dtype)


def format_bytes(size: int) -> str:
    """Return a size in bytes as text, in kB or, from a MiB on, in MiB."""
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 1000:.1f} kB"


def format_results(results: dict[str, float]) -> str:
    """Return the results as a table, one line each."""
    width = max(map(len, results), default=0)
    lines = [f"  {name:<{width}}  {_format(value):>14}" for name, value in results.items()]
    return "\n".join(["Results", *lines])


def save_results(results: Mapping[str, Any], file: str | Path, origin: Mapping[str, Any]) -> None:
    """
    Write results as JSON, in the main process only.

    Args:
        origin: the weights and the data that they are of.
    """
    from accelerate import PartialState

    if PartialState().is_main_process:  # all processes have the same results
        write_atomically(file, json.dumps({**results, **origin}, indent=4, ensure_ascii=False) + "\n")


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < _LARGE else f"{value:.4g}"
    return f"{value}"
