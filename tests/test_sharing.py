"""What of a data set is a process's own."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from glm_peft.training.parallel import sharing
from glm_peft.training.parallel.sharing import own_labels, own_rows


def rows_of_all(patch: pytest.MonkeyPatch, size: int, processes: int, batch_size: int) -> list[list[int]]:
    """The rows of the last batch of each process, cut by `own_rows`; accelerate deals them out."""
    cut = []
    for index in range(processes):
        sampler = BatchSampler(SequentialSampler(range(size)), batch_size, drop_last=False)
        last = list(BatchSamplerShard(sampler, processes, index))[-1]
        loading = SimpleNamespace(end_of_dataloader=True, remainder=size % (processes * batch_size))
        patch.setattr(sharing, "GradientState", lambda loading=loading: loading)
        state = SimpleNamespace(num_processes=processes, process_index=index)
        patch.setattr(sharing, "PartialState", lambda state=state: state)
        cut.append(own_rows({"input_ids": torch.tensor(last)[:, None]})["input_ids"].flatten().tolist())
    return cut


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [[0], [0, 0], [0, 0]]),
        (2, [[0, 1], [0, 1], [0, 1]]),
        (5, [[0, 1], [2, 3], [4]]),
        (6, [[0, 1], [2, 3], [4, 5]]),
        (9, [[6, 7], [8], [1, 2]]),
    ],
)
def test_last_batches_are_those_of_one_process_where_they_have_rows_of_their_own(monkeypatch, size, expected):
    assert rows_of_all(monkeypatch, size, 3, 2) == expected


def test_labels_are_counted_alone_within(monkeypatch):
    arguments = SimpleNamespace(average_tokens_across_devices=True)
    with pytest.raises(ZeroDivisionError), own_labels(arguments):
        assert not arguments.average_tokens_across_devices
        _ = 1 / 0
    assert arguments.average_tokens_across_devices
