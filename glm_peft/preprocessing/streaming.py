"""Stream the rows of training, which need not fit into memory: read, mixed, shuffled, encoded, packed on the way."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedConfig

from glm_peft.arguments.data import DataArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.columns import describe_unread
from glm_peft.preprocessing.conversations import Conversation, Split, open_rows, read_conversations
from glm_peft.preprocessing.packing import pack_stream

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    import datasets

logger = logging.getLogger(__name__)

_SKIPPED: dict[str, list[int]] = {"input_ids": [], "labels": []}


class Tally(list[Any]):
    """Tell of the 1st, 10th, 100th thing that is appended, and so on, instead of keeping any."""

    def __init__(self, effect: str, is_silent: bool = False) -> None:
        super().__init__()
        self.effect, self.is_silent, self.count = effect, is_silent, 0

    def append(self, found: Any) -> None:
        """Count, and maybe tell of, what was found."""
        self.count += 1
        if not self.is_silent and str(self.count).rstrip("0") == "1":
            logger.warning("%s: %s (%s so far).", found, self.effect, f"{self.count:,}")

    def __iadd__(self, found: Iterable[Any]) -> "Tally":
        for each in found:
            self.append(each)
        return self


def stream_conversations(head: Split, data_args: DataArguments, is_first: bool = True) -> Iterator[Conversation]:
    """
    Read the rows of a source of training from the first on, one after the other.

    Args:
        head: the source as its first rows were read, by which its columns are known.
        is_first: whether they are read for the first time: what is found is told once.

    Raises:
        UserError: a row cannot be used, as in `load_splits`.
    """
    split = replace(
        head,
        left_out=Tally("left out", not is_first),
        without_loss=Tally("left out, as none of its answers carries loss", not is_first),
        unoffered=Tally("a call of a tool that its row does not offer", not is_first),
        unread=head.unread.copy(),
    )
    rows = open_rows(data_args, head.name, head.source if data_args.train_file else None)
    used = 0
    for conversation in islice(read_conversations(rows, split, data_args), data_args.max_train_samples):
        yield conversation
        used += 1
        if is_first and len(split.unread) > len(head.unread):
            new = {name: number for name, number in split.unread.items() if name not in head.unread}
            logger.warning("%s: %s.", conversation.where, describe_unread(Counter(new)))
            head = replace(head, unread=split.unread.copy())
    if is_first:
        left_out = split.left_out.count + split.without_loss.count
        logger.info("%s: read to its end, %s rows used, %s left out.", split.source, f"{used:,}", f"{left_out:,}")


@dataclass
class StreamedExamples(IterableDataset[dict[str, Any]]):
    """
    Examples of training that have no end: after the last row the first come again, in another order.

    The order depends on the arguments alone. Every process and every worker of its data loader reads all rows; which
    batches a process has is accelerate's to say, and its workers take turns, so that no row is there twice.

    Args:
        sources: for each what reads its turns (a prompt `messages`, its `answer`, and `where` it is), given whether it
            is the first time.
        weights: of the sources.
        encode: makes an example of a turn, with its `length`, and with `prompt_length` and `answer_length` uncut.
        data_args: the limits, the buffer, the seed and the packing.
        config: of the base.
        block: examples of a batch, on all devices.
        skipped: how many of them a resumed run has had: they come empty, as nobody looks at them.
    """

    sources: Sequence[Callable[[bool], Iterator[dict[str, Any]]]]
    weights: Sequence[float]
    encode: Callable[..., dict[str, Any]]
    data_args: DataArguments
    config: PreTrainedConfig
    block: int
    skipped: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        args, limits = self.data_args, {"prompt": "max_source_length", "answer": "max_target_length"}
        self.cut = {
            (name, getattr(args, limit)): Tally(f"its {name} is cut to --{limit} {getattr(args, limit)}")
            for name, limit in limits.items()
        }
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if number:  # every worker finds the same in the rows: the first one tells of it
            logging.getLogger("glm_peft").setLevel(logging.ERROR)
        if args.packing:  # which examples share a row depends on all of them, so none is left to another worker
            items = pack_stream(map(self._encode, self._turns()), args.max_length, self.config, args.rows_seed)
        else:
            items = self._turns()
        for place, item in enumerate(items):
            if place // self.block % workers == number:
                yield _SKIPPED if place < self.skipped else item if args.packing else self._encode(item)

    def _encode(self, turn: dict[str, Any]) -> dict[str, list[int]]:
        example, args = self.encode(**turn), self.data_args
        for (name, limit), tally in self.cut.items():
            if example[f"{name}_length"] > limit:
                tally.append(turn["where"])
        if args.packing and example["length"] > args.max_length:
            raise UserError(
                f"{turn['where']}: the example has {example['length']} tokens, and a packed row --max_length "
                f"{args.max_length}: give at least that, or lower --max_source_length or --max_target_length."
            )
        return {name: example[name] for name in ("input_ids", "labels")}

    def _turns(self) -> Iterator[dict[str, Any]]:
        for number in count():
            turn = None
            for batch in self._pass(number).iter(1):
                turn = {name: value for name, (value,) in batch.items()}
                yield turn
            if turn is None:
                raise UserError("--streaming finds no rows any more: was the file replaced?")

    def _pass(self, number: int) -> "datasets.IterableDataset":
        """Return all turns, once, in an order of their own."""
        import datasets
        from datasets.iterable_dataset import ExamplesIterable

        seed = self.data_args.rows_seed + number
        # Not by `from_generator`, which leaves a lock file in the cache for each.
        parts = [
            datasets.IterableDataset(ExamplesIterable(partial(_with_keys, read, number == 0), {}))
            for read in self.sources
        ]
        shares = [weight / sum(self.weights) for weight in self.weights]
        strategy = self.data_args.stopping_strategy
        mixed = (
            datasets.interleave_datasets(parts, shares, seed, stopping_strategy=strategy) if parts[1:] else parts[0]
        )
        return mixed.shuffle(seed, buffer_size=self.data_args.shuffle_buffer_size)


def _with_keys(
    read: Callable[[bool], Iterator[dict[str, Any]]], is_first: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(read(is_first))
