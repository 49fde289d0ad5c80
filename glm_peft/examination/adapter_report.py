"""Format what `glm_peft.inspect_adapter` measured as tables of plain text."""

from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

import pandas

from glm_peft.examination.adapter_statistics import Prefix
from glm_peft.examination.prefix_importance import Importance
from glm_peft.provenance.record import as_mapping

_MOST_SCORES = 4  # of some ten or more that a run with generation has
_SOURCES = {"continued_from": "continued from", "converted_from": "converted from", "pruned_from": "pruned from"}


def format_sizes(prefix: Prefix) -> str:
    """Return virtual tokens, layers, width, and the size on a disk, as a line."""
    parameters = prefix.weight.numel()
    return (
        f"  {prefix.num_virtual_tokens} virtual tokens x {prefix.num_layers} layers x (key + value) x {prefix.width} "
        f"= {parameters:,} parameters, {4 * parameters / 1000:,.0f} kB in float32"
    )


def format_provenance(record: Mapping[str, Any], recorded_base: str | None) -> str:
    """Return an adapter's base, training data, source and scores, as far as they are recorded, in a few lines."""
    # Each value is checked: the record is a file that anyone may have edited.
    base = as_mapping(record.get("base"))
    lines = [f"base: {base.get('name') or recorded_base or 'not recorded'}"]
    if base.get("generation") or record.get("chat_format"):
        lines[0] += f" ({base.get('generation') or 'generation not recorded'}, prompts of {record.get('chat_format')})"
    data = as_mapping(as_mapping(record.get("data")).get("train"))
    if data:
        lines.append(f"trained on: {data.get('file') or data.get('dataset')}, {data.get('rows')} rows")
    lines += [
        f"{words}: {as_mapping(record[name]).get('name')}" for name, words in _SOURCES.items() if record.get(name)
    ]
    scores = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in as_mapping(record.get("scores")).items()
    ]
    if scores:
        more = f" and {len(scores) - _MOST_SCORES} more" if len(scores) > _MOST_SCORES else ""
        lines.append(f"scores: {', '.join(scores[:_MOST_SCORES])}{more}")
    return indent("\n".join(lines), "  ")


def format_layers(layers: Sequence[Mapping[str, float]], decimals: int = 3) -> str:
    """Return a line for each layer with its measures, under their names."""
    return _table([{"layer": number, **layer} for number, layer in enumerate(layers)], decimals)


def format_changes(importance: Importance) -> str:
    """Return the loss with and without the prefix, and a line for each virtual token, the most important first."""
    ranked = sorted(enumerate(importance.changes), key=lambda pair: -pair[1])
    rows = [{"token": token, "loss": importance.loss + change, "change": change} for token, change in ranked]
    # Five decimals, as one token of many moves the loss by less than the fourth.
    return (
        f"  {importance.num_examples} examples with {importance.num_answer_tokens} answer tokens; with the prefix "
        f"{importance.loss:.4f}, without {importance.loss_without_prefix:.4f}\n{_table(rows, decimals=5)}"
    )


def _table(rows: Sequence[Mapping[str, float]], decimals: int) -> str:
    # A cosine with zeros, as a prefix that starts at zero has, is no number.
    table = pandas.DataFrame(rows).to_string(index=False, float_format=f"{{:,.{decimals}f}}".format, na_rep="-")
    return indent(table, "  ")
