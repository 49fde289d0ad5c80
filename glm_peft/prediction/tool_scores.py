"""Read the calls of tools in answers, and score them against those of the references."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from glm_peft.data import GenerationFeatures
from glm_peft.models.chat_formats import ChatFormat
from glm_peft.models.tool_formats import ToolCall, tool_names

CALL_SCORE_NAMES = ("call_exact_match", "call_name_match", "call_valid")


def read_calls(
    features: GenerationFeatures, answers: Sequence[str], chat_format: ChatFormat
) -> list[tuple[list[ToolCall], list[ToolCall]] | None]:
    """
    Read the calls in each row's reference and in its answer; nothing of a text is evaluated.

    Returns:
        Both lists, or `None` for a row that offers no tools.
    """
    rows = zip(features.rows, features.references, answers, strict=True)
    return [_read_row(tool_names(row["messages"]), *texts, chat_format) for row, *texts in rows]


def _read_row(
    offered: list[str], reference: str | None, answer: str, chat_format: ChatFormat
) -> tuple[list[ToolCall], list[ToolCall]] | None:
    if not offered:
        return None
    _, wanted = chat_format.read_turn(reference or "")
    _, found = chat_format.read_turn(answer, {*offered, *(call.name for call in wanted)})
    return wanted, found


def score_calls(features: GenerationFeatures, answers: Sequence[str], chat_format: ChatFormat) -> dict[str, float]:
    """
    Score the rows that offer tools and whose reference calls some.

    Returns:
        Shares of those rows, 0 to 100: `call_exact_match` has the same calls with equal arguments, `call_name_match`
        calls the same tools, `call_valid` calls something, with arguments that can be read. Empty without such rows.
    """
    rows = [row for row in read_calls(features, answers, chat_format) if row and row[0]]
    if not rows:
        return {}
    measures = (_is_exact, _has_names, _is_valid)
    return {
        name: 100 * fmean(measure(wanted, found) for wanted, found in rows)
        for name, measure in zip(CALL_SCORE_NAMES, measures, strict=True)
    }


def describe_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Return calls as JSON has them; arguments that cannot be read are null."""
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def _is_exact(wanted: list[ToolCall], found: list[ToolCall]) -> bool:
    # As JSON: to Python 1, 1.0 and true are equal.
    first, second = (json.dumps(describe_calls(calls), sort_keys=True) for calls in (wanted, found))
    return first == second


def _has_names(wanted: list[ToolCall], found: list[ToolCall]) -> bool:
    return [call.name for call in wanted] == [call.name for call in found]


def _is_valid(wanted: list[ToolCall], found: list[ToolCall]) -> bool:
    return bool(found) and all(call.arguments is not None for call in found)
