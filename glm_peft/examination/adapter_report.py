"""Format what `glm_peft.inspect_adapter` measured as tables of plain text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glm_peft.examination.adapter_statistics import KINDS, Prefix
from glm_peft.examination.prefix_importance import Importance
from glm_peft.provenance.record import as_mapping
from glm_peft.provenance.stretches import read_stretches

_COLUMN = 10
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
    lines = [f"  base: {base.get('name') or recorded_base or 'not recorded'}"]
    if base.get("generation") or record.get("chat_format"):
        lines[0] += f" ({base.get('generation') or 'generation not recorded'}, prompts of {record.get('chat_format')})"
    data = [as_mapping(stretch.get("data")) for stretch in read_stretches(record)]
    told = [f"{one.get('file') or one.get('dataset')}, {one.get('rows')} rows" for one in data]
    lines += [f"  trained on: {'; then on '.join(dict.fromkeys(told))}"] if told else []
    lines += [
        f"  {words}: {as_mapping(record[name]).get('name')}" for name, words in _SOURCES.items() if record.get(name)
    ]
    scores = as_mapping(record.get("scores"))
    if scores:
        shown = list(scores.items())[:_MOST_SCORES]
        more = f" and {len(scores) - _MOST_SCORES} more" if len(scores) > _MOST_SCORES else ""
        lines.append(f"  scores: {', '.join(f'{name} {_score(value)}' for name, value in shown)}{more}")
    return "\n".join(lines)


def format_norms(norms: Sequence[Mapping[str, float]]) -> str:
    """Return a line for each layer: mean, lowest and highest norm of keys and of values, and their ratio."""
    measures = ("mean", "lowest", "highest")
    header = ["key mean", *measures[1:], "value mean", *measures[1:], "key/value"]
    names = [f"{kind}_{measure}" for kind in KINDS for measure in measures] + ["keys_to_values"]
    table = _table("layer", header, [[layer[name] for name in names] for layer in norms])
    return f"  Norms of the virtual tokens' keys and values\n{table}"


def format_comparison(layers: Sequence[Mapping[str, float]]) -> str:
    """Return a line for each layer: cosine, distance and relative distance, of keys and of values."""
    measures = ("cosine", "distance", "relative_distance")
    header = [name for kind in KINDS for name in (f"{kind[:-1]} cosine", "distance", "relative")]
    names = [f"{kind}_{measure}" for kind in KINDS for measure in measures]
    return _table("layer", header, [[layer[name] for name in names] for layer in layers])


def format_attention(importance: Importance) -> str:
    """Return a line for each layer: its share of attention on the prefix."""
    shares = [100 * share for share in importance.attention]
    return _table("layer", ["%"], [[share] for share in shares], decimals=1)


def format_changes(importance: Importance) -> str:
    """Return the loss with and without the prefix, and a line for each virtual token, the most important first."""
    ranked = sorted(enumerate(importance.changes), key=lambda pair: -pair[1])
    rows = [[importance.loss + change, change] for _, change in ranked]
    lines = [
        f"  {importance.num_examples} examples with {importance.num_answer_tokens} answer tokens; with the prefix "
        f"{importance.loss:.4f}, without {importance.loss_without_prefix:.4f}",
        # Five decimals, as one token of many moves the loss by less than the fourth.
        _table("token", ["loss", "change"], rows, [token for token, _ in ranked], decimals=5),
    ]
    return "\n".join(lines)


def _table(
    first: str,
    header: Sequence[str],
    rows: Sequence[Sequence[float]],
    names: Sequence[int] | None = None,
    decimals: int = 3,
) -> str:
    """Return a table of right-aligned numbers; its lines are called `names`, or numbered from 0 without them."""
    width = max(_COLUMN, *(len(name) + 2 for name in header))
    lines = [f"  {first:>5}" + "".join(f"{name:>{width}}" for name in header)]
    for name, values in zip(names or range(len(rows)), rows, strict=True):
        lines.append(f"  {name:>5}" + "".join(f"{_number(value, decimals):>{width}}" for value in values))
    return "\n".join(lines)


def _number(value: float, decimals: int) -> str:
    # A cosine with zeros, as a prefix that starts at zero has.
    return "-" if math.isnan(value) else f"{value:,.{decimals}f}"


def _score(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
