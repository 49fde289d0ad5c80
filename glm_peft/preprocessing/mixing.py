"""Mix the examples of several sources by their weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm_peft.arguments.data import DataArguments
from glm_peft.preprocessing.conversations import Split

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset


@dataclass(frozen=True)
class MixtureReport:
    """Report on a mixture; `sources` has for each name its weight as a share, its examples, and how many are drawn."""

    sources: Mapping[str, tuple[float, int, int]]
    stopping_strategy: str

    @property
    def examples(self) -> int:
        """Return how many examples the mixture has."""
        return sum(drawn for _, _, drawn in self.sources.values())

    def __str__(self) -> str:
        lines = [f"train: {self.examples} examples mixed of {len(self.sources)} sources, {self.stopping_strategy}"]
        for name, (share, examples, drawn) in self.sources.items():
            found = f"{drawn} drawn ({100 * drawn / self.examples:.1f} %) of {examples} examples"
            lines.append(f"  {name}: weight {100 * share:.1f} %, {found}, {drawn / examples:.2f} times each")
        return "\n".join(lines)


def mix_sources(
    parts: Sequence[Split], examples: Sequence["Dataset"], data_args: DataArguments
) -> tuple["Dataset", MixtureReport]:
    """
    Draw from the examples of several sources with the probabilities that their weights give.

    Args:
        parts: the sources, in the order of `examples`.
    """
    from datasets import interleave_datasets

    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    marked = [dataset.add_column("source", [number] * len(dataset)) for number, dataset in enumerate(examples)]
    features = max((each.features for each in marked), key=lambda each: each["labels"].feature.dtype)  # int64: weights
    marked = [each if each.features == features else each.cast(features) for each in marked]
    strategy = data_args.stopping_strategy
    # By a seed of its own: every process, and a run that is resumed, mixes the same.
    mixed = interleave_datasets(marked, shares, seed=data_args.rows_seed, stopping_strategy=strategy)
    drawn = Counter(mixed["source"][:])
    told = {
        part.source_name: (share, len(own), drawn[number])
        for number, (part, share, own) in enumerate(zip(parts, shares, examples, strict=True))
    }
    of_first = ", as the first rows are mixed" if data_args.streaming else ""
    return mixed.remove_columns("source"), MixtureReport(told, strategy + of_first)
