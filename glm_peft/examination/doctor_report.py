"""Format what the doctor found, for a terminal or a file."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TextIO

from transformers import PreTrainedConfig

from glm_peft.examination.data_checks import Finding
from glm_peft.examination.memory_estimate import BaseSize, Memory, Settings, estimate_memory, fit_settings
from glm_peft.preprocessing.lengths import LengthReport, Lengths

GB = 10**9
GPU_SIZES = (8, 16, 24, 80)  # GB

_BAR_WIDTH = 40
_MOST_BINS = 12
_SHOWN_ROWS = 5
_FAR = 3  # times what nine in ten texts have: there a histogram ends, and no flag is suggested for longer ones
_DIM, _GREEN, _PLAIN = "\033[2m", "\033[32m", "\033[0m"
_MEMORY_LINES = {
    "base": "base, frozen",
    "prefix_and_optimizer": "prefix, gradient, AdamW",
    "prefix_in_use": "prefix in attention",
    "activations": "activations",
    "work": "temporary: logits or MLP",
    "reserve": "CUDA and reserve",
    "total": "total",
}

# Of the pages of a mapped file, which the system's own count of a process's memory includes.
_MAPPED = "  Resident up to {:.2f} GB more: the weight files that are read, until the system needs the room."


def format_histogram(name: str, lengths: Sequence[int], limit: int) -> str:
    """
    Draw a histogram of lengths in tokens, one line a bin; the last bin holds what is far longer than the rest.

    Args:
        limit: where texts are cut; bins that lie fully above it are drawn lighter.
    """
    # A single long text would otherwise press all others into the first bin.
    longest = max(lengths)
    width = _bin_width(min(longest, _FAR * _held_by_nine_in_ten(lengths)))
    last = min(longest, _FAR * _held_by_nine_in_ten(lengths)) // width
    counts = [0] * (last + 1)
    for length in lengths:
        counts[min(length // width, last)] += 1
    first = next(number for number, count in enumerate(counts) if count)
    lines = [f"  {name}, in tokens (limit {limit})"]
    for number, count in enumerate(counts[first:], first):
        start = number * width
        # Rounded up, so that even one text among thousands is seen.
        bar = ("░" if start > limit else "█") * math.ceil(_BAR_WIDTH * count / max(counts))
        label = f"{start}–{start + width - 1}" if width > 1 else f"{start}"
        is_open = number == last and longest >= start + width
        lines.append(f"  {f'{start}–{longest}' if is_open else label:>13} {count:>8}  {bar}".rstrip())
    return "\n".join(lines)


def _held_by_nine_in_ten(lengths: Sequence[int]) -> int:
    return max(sorted(lengths)[math.ceil(0.9 * len(lengths)) - 1], 1)


def _bin_width(longest: int) -> int:
    """Return 1, 2 or 5 times a power of ten, so that there are few bins."""
    power = 10 ** max(int(math.log10(max(longest, 1))) - 1, 0)
    # Starts a power lower than the longest: some ten bins are the finest that can still be read.
    return next(width for width in (power, 2 * power, 5 * power, 10 * power) if longest // width < _MOST_BINS)


def format_findings(findings: Iterable[Finding]) -> str:
    """Return one line for each finding, with its first rows below it."""
    lines = []
    for finding in findings:
        lines.append(f"  {finding.what}: {len(finding.rows)}; {finding.advice}")
        lines += _first_rows(finding.rows, _SHOWN_ROWS)
    return "\n".join(lines) or "  Nothing found."


def format_problems(problems: Sequence[str], most: int) -> str:
    """Return what keeps training from starting, `most` lines of it."""
    return "\n".join(_first_rows(problems, most))


def _first_rows(rows: Sequence[str], most: int) -> list[str]:
    more = [f"    … and {len(rows) - most} more"] if len(rows) > most else []
    return [f"    {row}" for row in rows[:most]] + more


def format_suggestion(report: LengthReport) -> str:
    """Suggest length flags that hold 99 % of the texts, 90 % where some are far longer, if the given ones do not."""
    short = [(lengths, *_suggest(lengths)) for lengths in report.lengths]
    short = [(lengths, limit, share) for lengths, limit, share in short if limit > lengths.limit]
    if not short:
        return f"  The lengths that are given hold {_least_share(report)} % of the texts: nothing to change."
    # One line that can be pasted behind the command, and what it changes.
    flags = " ".join(f"{lengths.flag} {limit}" for lengths, limit, _ in short)
    cut = " and ".join(f"{100 * x.truncated / report.examples:.1f} % of the {x.name}s" for x, _, _ in short)
    held = min(share for _, _, share in short)
    return f"  {flags}\n  These hold {held} %; the lengths that are given cut {cut}."


def _suggest(lengths: Lengths) -> tuple[int, int]:
    """Return a limit and the percentage of texts that it holds, 99 or 90."""
    # Every row would pay in time and memory for a few texts that are far longer than the rest.
    nine_in_ten = lengths.percentiles[1]
    if lengths.suggestion > _FAR * nine_in_ten:
        return nine_in_ten, 90
    return lengths.suggestion, 99


def _least_share(report: LengthReport) -> int:
    return min(99 if lengths.suggestion <= lengths.limit else 90 for lengths in report.lengths)


def shows_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`: on a terminal that can, and not with `NO_COLOR` (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colour_example(description: str) -> str:
    """Colour the lines of `describe_example` for a terminal: what carries loss is green, the rest dim."""
    lines, colour = [], ""
    for line in description.split("\n"):
        name = line[:10].strip()  # the column that says it; lines without go on with the one before
        colour = {"loss": _GREEN, "no loss": _DIM}.get(name, colour)
        lines.append(f"{colour}{line}{_PLAIN}" if colour else line)
    return "\n".join(lines)


def format_memory(config: PreTrainedConfig, settings: Settings, base: BaseSize) -> str:
    """Return the estimate with and without activation checkpointing, and what makes training fit common GPUs."""
    plain, checkpointed = (
        estimate_memory(config, replace(settings, activation_checkpointing=is_on), base) for is_on in (False, True)
    )
    given = "with" if settings.activation_checkpointing else "without"
    lines = [
        f"  {_describe(settings, base)}",
        f"  {'GB':<26}{'without':>10}{'with':>10}  activation checkpointing (the flags say {given})",
        *(_memory_line(name, plain, checkpointed) for name in _MEMORY_LINES),
    ]
    if settings.mapped_element:
        lines.append(_MAPPED.format(settings.mapped_element * base.parameters / GB))
    on_gpu = replace(settings, dtype=settings.gpu_dtype, kept_dtype=None)
    return "\n".join(lines + [_gpu_line(size, config, on_gpu, base) for size in GPU_SIZES])


def _describe(settings: Settings, base: BaseSize) -> str:
    precision = "half precision" if settings.element == 2 else "float32"
    precision += f" with weights kept in {settings.kept_dtype}" if settings.kept_dtype else ""
    bits = f", quantized to {settings.quantization_bit} bits" if settings.quantization_bit else ""
    return (
        f"{base.parameters:,} parameters in {precision}{bits}; {settings.num_virtual_tokens} virtual tokens; "
        f"rows of up to {settings.tokens} tokens, {settings.batch_size} in a batch"
    )


def _memory_line(name: str, plain: Memory, checkpointed: Memory) -> str:
    values = "".join(f"{getattr(memory, name) / GB:>10.2f}" for memory in (plain, checkpointed))
    return f"  {_MEMORY_LINES[name]:<26}{values}"


def _gpu_line(size: int, config: PreTrainedConfig, settings: Settings, base: BaseSize) -> str:
    flags = fit_settings(config, settings, size * GB, base)
    if flags is None:
        advice = "does not fit: lower --per_device_train_batch_size or the lengths"
    else:
        advice = f"add {' '.join(flags)}" if flags else "fits"
    return f"  GPU of {size:>2} GB: {advice}"
