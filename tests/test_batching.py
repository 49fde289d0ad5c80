"""The order and the layout of training batches: chosen from the data, the same after a resume, on every process."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler

from glm_peft.arguments.training import TrainingArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.batching import (
    Layout,
    LengthGroupedSampler,
    choose_layout,
    group_by_length,
    head_cost,
    plan_batching,
    weigh_layouts,
)
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.packing import BatchPackingCollator, PackingCollator, RowCost, plan_rows
from glm_peft.training.trainer import PrefixTrainer

TOKENIZER = SimpleNamespace(pad_token_id=0, padding_side="left", save_pretrained=lambda folder: None)
CONFIG = SimpleNamespace(model_type="glm", hidden_size=512, vocab_size=2048, num_hidden_layers=8, dtype="bfloat16")
COST = RowCost(128, 512)


def draw_lengths(number: int, low: int, high: int, seed: int = 0) -> list[int]:
    return torch.randint(low, high, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_examples(lengths: list[int]) -> Dataset:
    rows = [list(range(1, length + 1)) for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "length": lengths})


@pytest.fixture(autouse=True)
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one counts as one without AMX and AVX512-BF16."""
    monkeypatch.setattr("glm_peft.models.loading.has_fast_bfloat16", lambda: False)


def plan(lengths, packing=None, order="auto", attention=None, ignore_pad=True, batch_size=16, config=CONFIG):
    training = {"train_batch_size": batch_size, "gradient_accumulation_steps": 1, "world_size": 1}
    training |= {"neftune_noise_alpha": None, "device": torch.device("cpu")}
    arguments = (
        SimpleNamespace(num_virtual_tokens=128, attn_implementation=attention, dtype="auto"),
        SimpleNamespace(objective="sft", packing=packing, max_length=512, streaming=False),
        SimpleNamespace(train_sampling_strategy=order, **training),
    )
    return plan_batching(make_examples(lengths), TrainingCollator(TOKENIZER, ignore_pad), config, arguments)


def order_of(lengths: list[int], size: int, seed: int = 0) -> list[int]:
    return group_by_length(torch.tensor(lengths), size, torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("number, size", [(1000, 16), (1000, 7), (100, 16), (17, 16), (5, 16), (1, 1)])
def test_every_example_comes_once_and_the_longest_step_first(number, size):
    lengths = draw_lengths(number, 8, 500)
    order = order_of(lengths, size)
    assert sorted(order) == list(range(number))
    whole = number // size * size
    assert not whole or max(lengths[index] for index in order[:size]) == max(lengths[i] for i in order[:whole])


def test_steps_are_of_like_length_and_shuffled():
    lengths = draw_lengths(10_000, 8, 500)
    order = order_of(lengths, 16)
    steps = [[lengths[index] for index in order[start : start + 16]] for start in range(0, 10_000, 16)]
    assert sum(max(step) * len(step) for step in steps) < 1.03 * sum(lengths)
    falling = sum(sum(first) > sum(second) for first, second in zip(steps, steps[1:], strict=False))
    assert 0.4 < falling / len(steps) < 0.6


def test_an_epoch_has_one_order_whenever_it_is_begun_and_each_its_own():
    lengths, epoch = draw_lengths(500, 8, 500), 0
    sampler = LengthGroupedSampler(lengths, 16, 42, lambda: epoch)
    first = list(sampler)
    torch.manual_seed(7)
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first
    assert len(sampler) == 500


def test_the_processes_of_a_step_have_examples_of_like_length():
    lengths = draw_lengths(2000, 8, 500)
    sampler = LengthGroupedSampler(lengths, 2 * 3 * 4, 0, lambda: 0)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 4, False), 2, process)) for process in range(2)]
    for step in range(0, len(shards[0]) - 3, 3):
        own = [lengths[index] for shard in shards for batch in shard[step : step + 3] for index in batch]
        assert max(own) - min(own) < 100
    assert sorted({index for shard in shards for batch in shard for index in batch}) == list(range(2000))


def test_nothing_is_changed_where_all_rows_are_equal():
    planned = plan([100] * 200)
    assert planned.order == "random" and isinstance(planned.collator, TrainingCollator)
    assert planned.reason.startswith("Batches are in random order")


def test_single_examples_are_not_grouped():
    assert plan(draw_lengths(200, 8, 500), batch_size=1).order == "random"


def test_skewed_lengths_are_packed_in_an_order_that_stays():
    lengths = torch.empty(3000).log_normal_(5.2, 0.7, generator=torch.Generator().manual_seed(0)).clamp(8, 512)
    planned = plan(lengths.int().tolist())
    assert planned.order == "random" and isinstance(planned.collator, BatchPackingCollator)
    assert "Batches are packed" in planned.reason and "grouped by length, " in planned.reason


@pytest.mark.parametrize("changes", [{"packing": False}, {"attention": "flash_attention_2"}, {"ignore_pad": False}])
def test_where_packing_cannot_be_skewed_lengths_are_grouped(changes):
    planned = plan(draw_lengths(3000, 8, 500), **changes)
    assert planned.order == "group_by_length" and isinstance(planned.collator, TrainingCollator)
    assert "packed" not in planned.reason


@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_an_order_that_is_asked_for_is_kept(order):
    assert plan(draw_lengths(1000, 8, 500), order=order).order == order
    assert plan(draw_lengths(1000, 8, 500), order=order, packing=True).order == order


def test_packing_that_is_asked_for_makes_rows_of_the_data_set():
    lengths = draw_lengths(100, 8, 500)
    planned = plan(lengths, packing=True)
    assert isinstance(planned.collator, PackingCollator) and planned.order == "random"
    assert len(planned.examples) == len(plan_rows(lengths, 512))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_packing_is_refused_where_the_attention_knows_no_blocks(attention):
    with pytest.raises(UserError, match=f"--attn_implementation {attention} cannot keep the examples of a packed row"):
        plan([20] * 40, packing=True, attention=attention)


def test_a_head_that_is_most_of_the_work_leaves_less_to_save():
    lengths = draw_lengths(1000, 90, 110)
    wide = SimpleNamespace(**vars(CONFIG) | {"vocab_size": 4_000_000})
    assert plan(lengths).order == "group_by_length" and plan(lengths, config=wide).order == "random"


def test_the_head_works_where_there_is_a_label():
    rows = [{"labels": [-100, -100, 5, 6], "length": 4}, {"labels": [-100, 7], "length": 2}]
    config = SimpleNamespace(hidden_size=256, vocab_size=130_528, num_hidden_layers=6)
    layers, head = 12 * 256**2 * 6 * 6, 256 * 130_528 * 3
    assert head_cost(Dataset.from_list(rows), config) == pytest.approx(head / layers)


def test_what_is_weighed_is_what_the_collators_make():
    lengths = draw_lengths(160, 8, 500)
    layout = weigh_layouts(lengths, 16, 16, COST)["packing"]
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0)).tolist()
    packed = BatchPackingCollator(TOKENIZER, TrainingCollator(TOKENIZER), CONFIG, COST)
    rows = list(make_examples(lengths))
    batches = [packed([rows[index] for index in order[start : start + 16]]) for start in range(0, 160, 16)]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    assert layout.padding == pytest.approx(1 - sum(lengths) / tokens)
    assert layout.cost == pytest.approx(sum(COST(*batch["input_ids"].shape) for batch in batches) / sum(lengths))


def test_where_products_are_fast_attention_weighs_more(monkeypatch):
    sizes = {"hidden_size": 4096, "vocab_size": 65024, "num_hidden_layers": 28}
    options = {"batch_size": 4, "config": SimpleNamespace(**vars(CONFIG) | sizes)}
    nearly_equal, skewed = draw_lengths(640, 90, 129), [16, 16, 16, 128] * 160
    assert isinstance(plan(nearly_equal, **options).collator, BatchPackingCollator)
    for name in ("models.loading", "preprocessing.batching"):
        monkeypatch.setattr(f"glm_peft.{name}.has_fast_bfloat16", lambda: True)
    assert isinstance(plan(nearly_equal, **options).collator, TrainingCollator)
    assert isinstance(plan(skewed, **options).collator, BatchPackingCollator)


@pytest.mark.parametrize("packing, chosen", [(0.58, "packing"), (0.7, "group_by_length"), (0.4, "packing")])
def test_packing_is_taken_where_it_saves_nearly_what_grouping_does(packing, chosen):
    costs = {"random": 2, "group_by_length": 1, "packing": 2 * packing}
    assert choose_layout({name: Layout(0, cost) for name, cost in costs.items()}, "auto") == chosen


class Recorder(torch.nn.Module):
    """Remembers the rows of every batch; its loss is that of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[list[list[int]]] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: torch.Tensor) -> dict:
        self.batches.append(input_ids.tolist())
        return {"loss": self.weight**2}


def train(folder, batching, checkpoint=None, **arguments) -> list[list[list[int]]]:
    settings = {"num_train_epochs": 3, "save_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True}
    model = Recorder()
    training_args = TrainingArguments(output_dir=str(folder), disable_tqdm=True, **(settings | arguments))
    trainer = PrefixTrainer(model, training_args, data_collator=TrainingCollator(TOKENIZER), batching=batching)
    trainer.train(resume_from_checkpoint=checkpoint)
    return model.batches


@pytest.mark.parametrize("layout", [{"packing": False}, {}])
@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_goes_on_with_the_very_batches(tmp_path, layout, step, monkeypatch):
    """Five steps an epoch: in the middle of the first, at its end, and in the middle of the second."""
    monkeypatch.setattr("glm_peft.training.trainer.load_trained_state", lambda model, folder: None)  # it is no model
    batching = plan(draw_lengths(38, 8, 100), batch_size=8, **layout)
    assert batching.order == ("group_by_length" if layout else "random")
    whole = train(tmp_path, batching, gradient_accumulation_steps=2)
    resumed = train(tmp_path, batching, str(tmp_path / f"checkpoint-{step}"), gradient_accumulation_steps=2)
    assert len(whole) == 30
    assert resumed == whole[2 * step :]


def test_a_step_sees_the_same_examples_packed_as_padded(tmp_path):
    lengths = draw_lengths(40, 8, 100)
    packed, padded = plan(lengths, batch_size=8), plan(lengths, batch_size=8, packing=False, order="random")
    seen = [
        [sorted(id_ for row in batch for id_ in row if id_) for batch in train(tmp_path / name, batching)]
        for name, batching in (("packed", packed), ("padded", padded))
    ]
    assert seen[0] == seen[1]
    assert isinstance(packed.collator, BatchPackingCollator)


def test_evaluation_is_padded_and_its_loss_weighed_as_ever(tmp_path):
    batching = plan(draw_lengths(40, 8, 100), batch_size=8)
    evaluated = make_examples([10, 3, 4, 3])
    model = Recorder()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = PrefixTrainer(
        model, arguments, data_collator=TrainingCollator(TOKENIZER), batching=batching, eval_dataset=evaluated
    )
    trainer.get_train_dataloader()
    trainer.evaluate()
    assert [len(row) for row in model.batches[0]] == [10] * 4
