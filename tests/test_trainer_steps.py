"""What the Trainer's settings do to the steps of a prefix: data, optimizer, schedule, noise, precision, place."""

import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.optim import AdamW as AdamWOf8Bits
from closeness import ROUNDING, assert_close
from short_runs import ROWS
from transformers import Adafactor, AutoTokenizer
from transformers.models.glm.modeling_glm import GlmMLP
from watched_runs import WatchedRun, watch

from glm_peft.adapters import assembly
from glm_peft.adapters.prefix_attention import decoder_layers
from glm_peft.models.loading import load_base_model
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.label_weights import split_labels
from glm_peft.training.trainer import PrefixTrainer

PLAIN = ["--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0"]
UNPACKED = ["--packing", "false"]


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


@pytest.fixture(scope="module")
def usual(base: Path, tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    return watch(base, tmp_path_factory.mktemp("usual") / "run", *UNPACKED)


def weighed_rows() -> Iterator[dict[str, Any]]:
    for number, row in enumerate(ROWS):
        answer = {"role": "assistant", "content": row["summary"], "weight": (1, 0.25, 3)[number % 3]}
        yield {"messages": [{"role": "user", "content": row["content"]}, answer]}


def answers_of(run: WatchedRun, base: Path) -> list[str]:
    """The colour of each row in the order of training, which tells the rows apart with their kind."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [tokenizer.decode(ids) for ids in run.rows()]
    return [next(row["content"] for row in ROWS if row["content"] in text) for text in texts]


# Data


@pytest.mark.parametrize(
    ("more", "columns"), [([], {"input_ids", "labels"}), (["--remove_unused_columns", "false"], None)]
)
def test_columns_that_the_model_does_not_take_are_removed(base, tmp_path, monkeypatch, more, columns):
    seen: set[str] = set()
    collate = TrainingCollator.__call__
    monkeypatch.setattr(TrainingCollator, "__call__", lambda *args: seen.update(args[1][0]) or collate(*args))
    run = watch(base, tmp_path, *UNPACKED, *more)
    assert seen == (columns or {"input_ids", "labels", "length"})
    assert set(run.batches[0][1]) == {"input_ids", "labels", "attention_mask", "position_ids"}


def test_the_order_is_random_and_that_of_the_seed(base, usual, tmp_path):
    first = answers_of(usual, base)
    again = answers_of(watch(base, tmp_path / "again", *UNPACKED), base)
    other = answers_of(watch(base, tmp_path / "other", *UNPACKED, "--data_seed", "7"), base)
    in_file = [row["content"] for row in ROWS]
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(in_file) and first != in_file


def test_a_sequential_order_is_that_of_the_file(base, tmp_path):
    run = watch(base, tmp_path, *UNPACKED, "--train_sampling_strategy", "sequential")
    assert answers_of(run, base) == [row["content"] for row in ROWS]


def test_a_batch_that_is_not_full_may_be_dropped(base, tmp_path):
    sizes = {}
    for drop in ("false", "true"):
        words = [*UNPACKED, "--per_device_train_batch_size", "5", "--dataloader_drop_last", drop]
        sizes[drop] = [len(batch["labels"]) for _, batch in watch(base, tmp_path / drop, *words).batches]
    assert sizes == {"false": [5, 5, 2], "true": [5, 5]}


def test_workers_make_the_batches_and_change_nothing(base, usual, tmp_path, monkeypatch):
    makers, collate = tmp_path / "makers", TrainingCollator.__call__

    def note_process(*args: Any) -> Any:
        with makers.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return collate(*args)

    monkeypatch.setattr(TrainingCollator, "__call__", note_process)
    words = ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", "true"]
    run = watch(base, tmp_path / "run", *UNPACKED, *words, "--max_steps", "6")
    assert len(set(makers.read_text().split()) - {str(os.getpid())}) == 2  # in both epochs the same
    assert run.rows()[:12] == usual.rows()


# Optimizer and schedule


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adafactor", Adafactor),
        ("rmsprop", torch.optim.RMSprop),
        ("adamw_bnb_8bit", AdamWOf8Bits),
    ],
)
def test_the_optimizer_is_the_one_that_is_named(base, usual, tmp_path, name, kind):
    run = watch(base, tmp_path, *UNPACKED, "--optim", name)
    assert type(run.trainer.optimizer.optimizer) is kind
    assert type(usual.trainer.optimizer.optimizer) is torch.optim.AdamW
    assert name == "adamw_bnb_8bit" or not torch.equal(run.prefix, usual.prefix)  # it keeps so few numbers in 32 bits


def test_plain_descent_takes_the_gradient_times_the_learning_rate(base, tmp_path):
    start = watch(base, tmp_path / "start", *PLAIN, "--max_steps", "1", "--learning_rate", "1e-9").prefix
    run = watch(base, tmp_path / "end", *PLAIN, "--max_steps", "1", "--learning_rate", "0.5")
    assert (run.prefix - start).norm().item() == pytest.approx(0.5 * run.logged("grad_norm")[0], rel=1e-4)


def test_a_gradient_above_the_norm_is_clipped_to_it(base, tmp_path):
    start = watch(base, tmp_path / "start", *PLAIN, "--max_steps", "1", "--learning_rate", "1e-9").prefix
    run = watch(base, tmp_path / "end", *PLAIN[:4], "--max_steps", "1", "--max_grad_norm", "1e-2")
    assert run.logged("grad_norm")[0] > 0.1
    assert (run.prefix - start).norm().item() == pytest.approx(1e-2, rel=1e-3)


COSINE = [math.cos(math.pi * step / 3) / 2 + 0.5 for step in range(3)]


@pytest.mark.parametrize(
    ("more", "shares"),
    [
        (["linear"], [1, 2 / 3, 1 / 3]),
        (["cosine"], COSINE),
        (["constant"], [1, 1, 1]),
        (["constant_with_warmup", "--warmup_steps", "2"], [0, 1 / 2, 1]),
        (["linear", "--warmup_steps", "0.66"], [0, 1 / 2, 1]),  # a share of the steps
        (["cosine_with_min_lr", "--lr_scheduler_kwargs", json.dumps({"min_lr_rate": 0.5})], [1, 0.875, 0.625]),
        (["polynomial", "--lr_scheduler_kwargs", json.dumps({"power": 2, "lr_end": 0})], [1, 4 / 9, 1 / 9]),
    ],
)
def test_the_schedule_is_the_one_that_is_named(base, tmp_path, more, shares):
    rates = watch(base, tmp_path, "--lr_scheduler_type", *more).logged("learning_rate")
    assert rates == pytest.approx([0.3 * share for share in shares], abs=1e-6)


# Loss


PACKED = ["--packing", "--max_length", "60"]


@pytest.mark.parametrize(("packing", "is_weighted"), [([], False), (PACKED, False), (PACKED, True)])
def test_accumulated_batches_are_one_large_one_also_where_the_last_are_few(base, tmp_path, packing, is_weighted):
    """Twelve examples in micro-batches of one, five a step: the last step of an epoch has two, of other lengths."""
    if is_weighted:
        (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, weighed_rows())), encoding="utf-8")
    words = [*PLAIN, *packing, "--num_train_epochs", "2"]
    large = watch(base, tmp_path / "large", *words, "--per_device_train_batch_size", "5")
    small = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "5"]
    run = watch(base, tmp_path / "small", *words, *small)
    assert len(run.batches) > len(large.batches)
    assert any(split_labels(batch["labels"])[1] is not None for _, batch in run.batches) is is_weighted
    assert run.logged("loss") == pytest.approx(large.logged("loss"), rel=ROUNDING)
    assert_close(run.prefix, large.prefix)


def listen_to_embeddings(heard: list[tuple[bool, torch.Tensor, torch.Tensor]], *args: Any) -> Any:
    """A base that tells whether it trains, the embeddings of its tokens, and what its first layer gets, [b, s, h]."""
    base = load_base_model(*args)
    embeddings, ids = base.get_input_embeddings(), []

    def listen(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        heard.append((layer.training, embeddings.weight[ids[-1]], states.detach()))

    embeddings.register_forward_pre_hook(lambda module, inputs: ids.append(inputs[0]))
    decoder_layers(base)[0].register_forward_pre_hook(listen, with_kwargs=True)
    return base


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_embeddings_have_neftune_s_noise_in_training_alone(tiny_model_dirs, tmp_path, generation, monkeypatch):
    heard: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(assembly, "load_base_model", partial(listen_to_embeddings, heard))
    run = watch(tiny_model_dirs[generation], tmp_path, *UNPACKED, "--neftune_noise_alpha", "5", "--do_eval")
    noise = {True: [], False: []}
    for is_training, plain, states in heard:
        noise[is_training].append((states - plain).abs() * math.sqrt(states.shape[1] * states.shape[2]))
    assert [value.max().item() for value in noise[False]] == [0, 0]
    assert len(noise[True]) == 3
    for value in noise[True]:  # even between -5 and 5, so 2.5 in the mean
        assert 4.9 < value.max() <= 5.001 and value.mean().item() == pytest.approx(2.5, rel=0.1)
    assert not hasattr(run.trainer.model.get_base_model().get_input_embeddings(), "neftune_noise_alpha")


def test_rows_are_not_packed_by_themselves_under_neftune(base, tmp_path):
    """The noise is the less, the longer the row."""
    plain, noisy = (
        watch(base, tmp_path / name, *more, "--num_virtual_tokens", "64", "--optim", "sgd")
        for name, more in (("plain", []), ("noisy", ["--neftune_noise_alpha", "1e-9"]))
    )
    assert min(len(batch["labels"]) for _, batch in plain.batches) < 4
    assert {len(batch["labels"]) for _, batch in noisy.batches} == {4}


# Precision, determinism and place


def test_mixed_precision_computes_in_16_bits_and_keeps_the_prefix_in_32(base, usual, tmp_path, monkeypatch):
    seen = set()
    compute = GlmMLP.forward

    def forward(self: GlmMLP, states: torch.Tensor) -> torch.Tensor:
        output = compute(self, states)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(GlmMLP, "forward", forward)
    run = watch(base, tmp_path, *UNPACKED, "--bf16")
    assert seen == {torch.bfloat16}
    assert run.prefix.dtype == torch.float32 and not torch.equal(run.prefix, usual.prefix)
    assert run.logged("loss") == pytest.approx(usual.logged("loss"), rel=torch.finfo(torch.bfloat16).eps / 2)


def test_full_determinism_lets_no_other_algorithm_run(base, usual, tmp_path, monkeypatch):
    found, step = [], torch.optim.AdamW.step

    def note(*args: Any, **kwargs: Any) -> Any:
        found.append(torch.are_deterministic_algorithms_enabled())
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    environment = dict(os.environ)
    try:
        run = watch(base, tmp_path, *UNPACKED, "--full_determinism")
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.clear()
        os.environ.update(environment)
    assert found == [True, True, True]
    assert torch.equal(run.prefix, usual.prefix)


def test_layers_that_a_device_map_spread_train_as_on_one_device(base, usual, tmp_path, monkeypatch):
    """Two names for the CPU stand for two GPUs: the hooks between layers, and the prefix on its layer's device."""

    def load(*args: Any) -> Any:
        model = load_base_model(*args)
        places = {
            name: torch.device("cpu", int(name == "model.layers.1")) for name in ("model.layers.0", "model.layers.1")
        }
        for name in places:
            add_hook_to_module(model.get_submodule(name), AlignDevicesHook("cpu", io_same_device=True))
        model.hf_device_map = places
        return model

    monkeypatch.setattr(assembly, "load_base_model", load)
    run = watch(base, tmp_path, *UNPACKED)
    assert run.trainer.is_model_parallel and not run.trainer.place_model_on_device
    assert torch.equal(run.prefix, usual.prefix)


def test_a_batch_that_is_too_large_for_the_memory_is_made_smaller(base, tmp_path, monkeypatch):
    step = PrefixTrainer.training_step

    def training_step(self: PrefixTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(inputs["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PrefixTrainer, "training_step", training_step)
    run = watch(base, tmp_path, *UNPACKED, "--auto_find_batch_size")
    done = [(step, len(batch["labels"])) for step, batch in run.batches if len(batch["labels"]) <= 2]
    assert done == [(step, 2) for step in range(6)]
