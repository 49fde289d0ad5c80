"""
Choose how examples become the batches of training: in which order, and padded or packed.

Padding in random order, grouping by length and packing within each batch are compared by what they would cost on the
data's own lengths. A step has the same number of examples in all three; with packing even the same examples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedConfig

from glm_peft.arguments.data import DPO
from glm_peft.arguments.training import TrainArguments, TrainingArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import choose_dtype, has_fast_bfloat16
from glm_peft.preprocessing.collators import IGNORED_LABEL, TrainingCollator
from glm_peft.preprocessing.packing import BatchPackingCollator, PackingCollator, RowCost, pack_examples, plan_batch

if TYPE_CHECKING:  # its import takes half a second, and an error in the arguments needs none
    from datasets import Dataset

GROUPING = "group_by_length"
_GROUPED_STEPS = 50  # steps whose examples are sorted together: fewer would pad more, more would mix less
_LEAST_PARTS = 4  # sorted separately: if all data were sorted at once, each epoch would have the same steps
_SAMPLED_BATCHES = 64  # on which padding and packing are estimated, as packing every batch would take long
_LEAST_GAIN = 0.03  # of the cost: below this, examples stay padded in random order
_ENOUGH = 0.8  # of what grouping saves: packing is then preferred, as it leaves the examples of each step together
_EVEN_IN_BFLOAT16 = 1  # see `RowCost`: on CPUs with AMX products are many times faster, and attention is not
_PACKS = (None, "sdpa", "eager")  # attention that takes a mask with a block for each example
_PACKS_WHEN_ASKED = (*_PACKS, "flex_attention")
_SAMPLED_LABELS = 256  # examples whose labels are counted: a share needs no more


@dataclass(frozen=True)
class Batching:
    """
    Hold what training makes batches of.

    `examples` are the rows, `collator` makes a batch of some, `order` is a value of `--train_sampling_strategy`, and
    `reason` says in one sentence what was chosen and why.
    """

    examples: "Dataset"
    collator: Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]
    order: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """Hold an estimate for batches: the share of padding among their tokens, and their cost per real token."""

    padding: float
    cost: float


def plan_batching(
    examples: "Dataset",
    padded: TrainingCollator,
    config: PreTrainedConfig,
    arguments: TrainArguments,
) -> Batching:
    """
    Return the layout of training's batches, chosen where `--packing` and `--train_sampling_strategy` leave it open.

    Args:
        examples: `input_ids`, `labels` and `length`.
        padded: makes ordinary batches.
        config: of the base.
        arguments: of the model, the data and training.

    Raises:
        UserError: with `--packing`, an example is longer than a row, or the attention cannot keep examples apart.
    """
    model_args, data_args, training_args = arguments
    order = training_args.train_sampling_strategy
    if data_args.objective == DPO:
        return Batching(examples, padded, _or_random(order), "Batches are pairs of answers, padded to the longest.")
    if data_args.packing:
        _check_packs(model_args.attn_implementation)
        rows = pack_examples(examples, data_args.max_length, config)
        told = "The first examples are p" if data_args.streaming else "P"
        reason = f"{told}acked into {len(rows)} rows of up to {data_args.max_length} tokens, as --packing asks."
        return Batching(rows, PackingCollator(padded.tokenizer, padded), _or_random(order), reason)
    cost = row_cost(arguments, config)
    head = head_cost(examples.select(range(min(len(examples), _SAMPLED_LABELS))), config)
    layouts = weigh_layouts(examples["length"][:], *row_sizes(training_args), cost, head)
    if data_args.streaming:  # which has no order by length
        del layouts[GROUPING]
        order = "random"
    # Where the loss includes padding, packing would change it; NEFTune's noise shrinks with the length of a row.
    may_pack = data_args.packing is None and padded.ignore_pad_token_for_loss
    may_pack = may_pack and training_args.neftune_noise_alpha is None
    if not may_pack or model_args.attn_implementation not in _PACKS:
        del layouts["packing"]
    chosen = choose_layout(layouts, order)
    planned = Batching(examples, padded, chosen, _reason(chosen, layouts))
    if chosen == "packing":
        collator = BatchPackingCollator(padded.tokenizer, padded, config, cost)
        planned = replace(planned, collator=collator, order=_or_random(order))
    return planned


def row_cost(arguments: TrainArguments, config: PreTrainedConfig) -> RowCost:
    """Return what the rows of a batch cost on the device of training."""
    model_args, _, training_args = arguments
    device = training_args.device
    cost = RowCost(model_args.num_virtual_tokens or 0, config.hidden_size)
    computes_in = choose_dtype(model_args.dtype, device, config.dtype)[0]
    has_it = device.type == "cpu" and computes_in == torch.bfloat16 and has_fast_bfloat16()
    return replace(cost, even=_EVEN_IN_BFLOAT16) if has_it else cost


def head_cost(examples: "Dataset", config: PreTrainedConfig) -> float:
    """Return what the head costs per token of the data, the same in every layout, in the unit of `RowCost`."""
    # The loss runs the head at positions with a label alone: vocabulary x h against 12 h² in every layer.
    labels = sum(label != IGNORED_LABEL for row in examples["labels"][:] for label in row)
    of_a_label = config.vocab_size / (12 * config.hidden_size * config.num_hidden_layers)
    return labels / sum(examples["length"][:]) * of_a_label


def weigh_layouts(
    lengths: list[int], batch_size: int, step_size: int, cost: RowCost, head: float = 0.0
) -> dict[str, Layout]:
    """
    Estimate padding and cost of each layout: `random`, `group_by_length` and `packing`.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples of a batch.
        step_size: examples of a step of the optimizer, on all devices.
        cost: of the rows of a batch.
        head: cost of the head per token, which lessens what a layout can gain.
    """
    tokens = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(0)
    shuffled = tokens[torch.randperm(len(tokens), generator=generator)]
    grouped = tokens[group_by_length(tokens, step_size, generator)]
    sample = shuffled[: _SAMPLED_BATCHES * batch_size].split(batch_size)
    layouts = {
        "random": _weigh(sample, [(len(batch), int(batch.max())) for batch in sample], cost),
        GROUPING: _weigh(*_padded(grouped, batch_size), cost),
        "packing": _weigh(sample, [_packed_shape(batch.tolist(), cost) for batch in sample], cost),
    }
    return {name: replace(layout, cost=layout.cost + head) for name, layout in layouts.items()}


def choose_layout(layouts: dict[str, Layout], order: str) -> str:
    """Return the name of the layout to use: where the user asked for an order, that order, or `packing` in it."""
    saved = {name: 1 - layout.cost / layouts["random"].cost for name, layout in layouts.items()}
    packing, grouping = saved.get("packing", 0.0), saved.get(GROUPING, 0.0)
    if order != "auto":
        return "packing" if order in ("random", "sequential") and packing > _LEAST_GAIN else order
    if max(packing, grouping) <= _LEAST_GAIN:
        return "random"
    return "packing" if packing >= _ENOUGH * grouping else GROUPING


def group_by_length(lengths: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """
    Return an order in which every `size` successive examples are of like length.

    Parts of up to fifty steps, at most a quarter of the data, are drawn, sorted, and cut into steps, which are then
    shuffled; a step that is not full comes last.

    Args:
        lengths: [n], in tokens.
        size: examples of a step.

    Returns:
        [n] indices.
    """
    order = torch.randperm(len(lengths), generator=generator)
    steps = -(-len(lengths) // size)
    parts = max(-(-steps // _GROUPED_STEPS), _LEAST_PARTS)
    parts = order.split(-(-steps // parts) * size)
    order = torch.cat([part[lengths[part].argsort(descending=True, stable=True)] for part in parts])
    whole = len(order) // size
    groups = order[: whole * size].view(whole, size)
    groups = groups[torch.randperm(whole, generator=generator)]
    if whole:
        # The longest first: a run that needs too much memory fails at its first step, not after hours.
        longest = int(lengths[groups].amax(dim=1).argmax())
        groups[[0, longest]] = groups[[longest, 0]]
    return torch.cat([groups.flatten(), order[whole * size :]])


class LengthGroupedSampler(Sampler[int]):
    """
    Sample in the order of `group_by_length`, which differs between epochs, but not when an epoch is begun again.

    Args:
        lengths: of all examples, in tokens.
        size: examples of a step of the optimizer, on all devices.
        seed: of the order.
        get_epoch: returns the number of the epoch that begins, which accelerate may not pass on after a resume.
    """

    def __init__(self, lengths: list[int], size: int, seed: int, get_epoch: Callable[[], int]) -> None:
        self.lengths = torch.tensor(lengths)
        self.size, self.seed, self.get_epoch = size, seed, get_epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.get_epoch())
        return iter(group_by_length(self.lengths, self.size, generator).tolist())


def row_sizes(training_args: TrainingArguments) -> tuple[int, int]:
    """Return how many examples a batch has, and a step of the optimizer, both on all devices."""
    # On all, as the devices wait for the longest batch among theirs, and the layout must not depend on their number.
    batch_size = training_args.train_batch_size * training_args.world_size
    return batch_size, batch_size * training_args.gradient_accumulation_steps


def _check_packs(attention: str | None) -> None:
    if attention not in _PACKS_WHEN_ASKED:
        raise UserError(
            f"--attn_implementation {attention} cannot keep the examples of a packed row apart: use sdpa or eager, or "
            "leave out --packing."
        )


def _or_random(order: str) -> str:
    return "random" if order == "auto" else order


def _padded(ordered: torch.Tensor, batch_size: int) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    batches = ordered.split(batch_size)
    return batches, [(len(batch), int(batch.max())) for batch in batches]


def _packed_shape(lengths: list[int], cost: RowCost) -> tuple[int, int]:
    rows = plan_batch(lengths, cost)
    return len(rows), max(sum(lengths[index] for index in row) for row in rows)


def _weigh(batches: list[torch.Tensor], shapes: list[tuple[int, int]], cost: RowCost) -> Layout:
    """Return the layout of batches, given the lengths of their examples, and their rows and tokens per row."""
    real = int(torch.cat(list(batches)).sum())
    total = sum(rows * length for rows, length in shapes)
    return Layout(1 - real / total, sum(cost(*shape) for shape in shapes) / real)


def _reason(chosen: str, layouts: dict[str, Layout]) -> str:
    """Return a sentence on the padding of the chosen layout, and on padding and time of the others."""
    names = {"random": "in random order", GROUPING: "grouped by length", "packing": "packed, several in a row"}
    own = layouts.get(chosen, layouts["random"])  # in an order of the user's, taken to be as good as random
    choice = names.get(chosen, f"in the order {chosen}")
    kept = ", which leaves the examples of each step as they are" if chosen == "packing" else ""
    others = [
        f"{names[name]}, {100 * layout.padding:.0f} %, and a step would take {_as_long(layout.cost / own.cost)}"
        for name, layout in layouts.items()
        if layout is not own
    ]
    return (
        f"Batches are {choice}{kept}: {100 * own.padding:.0f} % of the tokens are padding (as estimated: "
        f"{'; '.join(others)})."
    )


def _as_long(ratio: float) -> str:
    return "as long" if f"{ratio:.2f}" == "1.00" else f"{ratio:.2f} times as long"
