"""What surrounds the steps: callbacks, logs, counts, checkpoints, and evaluation."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import run_predict_logits
import torch
import transformers
from closeness import ROUNDING, assert_close
from short_runs import PROJECT
from transformers import AutoTokenizer, TrainerCallback
from warm_starts import warm_python
from watched_runs import WatchedRun, watch

from glm_peft import train
from glm_peft.preprocessing.collators import GenerationCollator, TrainingCollator
from glm_peft.reporting.log import choose_level, set_up_logging
from glm_peft.reporting.results import format_results

EVALUATED = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", "1"]


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


@pytest.fixture(scope="module")
def evaluated(base: Path, tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    return watch(base, tmp_path_factory.mktemp("evaluated") / "run", *EVALUATED, "--max_steps", "2")


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# Callbacks, progress and logs


class Counter(TrainerCallback):
    """How many steps ended."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        control.should_training_stop = self.steps == 2


def test_callbacks_are_added_popped_and_removed(base, tmp_path, monkeypatch):
    added, popped, removed = Counter(), Counter(), Counter()

    class WithCallbacks(train.PrefixTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(popped)
            assert self.pop_callback(Counter) is popped
            self.add_callback(removed)
            self.remove_callback(removed)
            self.add_callback(added)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(train, "PrefixTrainer", WithCallbacks)
    seen = watch(base, tmp_path)
    assert [added.steps, popped.steps, removed.steps] == [2, 0, 0]
    assert len(seen.batches) == 2  # of three: the callback stopped training


@pytest.mark.parametrize("is_disabled", [True, False])
def test_the_log_is_printed_or_beside_a_bar(base, tmp_path, capfd, is_disabled):
    watch(base, tmp_path, "--disable_tqdm", str(is_disabled))
    printed = capfd.readouterr()
    assert ("'loss': '7." in printed.out) and ("'grad_norm':" in printed.out)
    assert ("3/3" in printed.err) is not is_disabled


def test_logs_come_as_often_as_asked_and_with_the_first_step(base, tmp_path):
    run_of = {
        first: watch(base, tmp_path / first, "--logging_steps", "2", "--logging_first_step", first).log
        for first in ("true", "false")
    }
    steps = {first: [entry["step"] for entry in log if "loss" in entry] for first, log in run_of.items()}
    assert steps == {"true": [1, 2], "false": [2]}


@pytest.mark.parametrize(
    ("is_main", "flags", "own", "of_libraries"),
    [
        (True, {}, logging.INFO, logging.WARNING),
        (True, {"log_level": "error"}, logging.ERROR, logging.ERROR),
        (True, {"log_level": "debug"}, logging.DEBUG, logging.DEBUG),
        (False, {}, logging.ERROR, logging.ERROR),
        (False, {"log_level": "debug"}, logging.ERROR, logging.ERROR),
        (False, {"log_level_replica": "info"}, logging.INFO, logging.INFO),
    ],
)
def test_each_process_has_the_log_level_that_is_given_for_it(is_main, flags, own, of_libraries):
    given = {"log_level": "passive", "log_level_replica": "error", "should_log": is_main} | flags
    before = logging.getLogger("glm_peft").level, transformers.utils.logging.get_verbosity()
    try:
        set_up_logging(choose_level(SimpleNamespace(**given)), is_main)
        assert logging.getLogger("glm_peft").level == own
        assert transformers.utils.logging.get_verbosity() == of_libraries
    finally:
        logging.getLogger("glm_peft").setLevel(before[0])
        transformers.utils.logging.set_verbosity(before[1])
        transformers.utils.logging.enable_progress_bar()


def test_a_run_is_as_quiet_as_asked(base, tmp_path, caplog):
    watch(base, tmp_path / "quiet", "--log_level", "error")
    assert "trainable parameters" not in caplog.text
    watch(base, tmp_path / "usual")
    assert "trainable parameters" in caplog.text


# Counts


def test_speed_and_operations_are_among_the_results(evaluated):
    results = results_of(evaluated.folder)
    assert {"train_samples_per_second", "train_steps_per_second", "eval_samples_per_second"} <= set(results)
    weights = evaluated.trainer.model.num_parameters(exclude_embeddings=True)
    tokens = sum(batch["input_ids"].numel() for _, batch in evaluated.batches)
    assert results["total_flos"] == 6 * weights * tokens


def test_large_numbers_are_told_by_their_power_of_ten():
    assert format_results({"total_flos": 2.5e17, "loss": 7.5}).splitlines()[1:] == [
        "  total_flos         2.5e+17",
        "  loss                7.5000",
    ]


def test_memory_is_measured_on_request(base, evaluated, tmp_path):
    watch(base, tmp_path, *EVALUATED, "--max_steps", "1", "--skip_memory_metrics", "false")
    memory = {name for name in results_of(tmp_path) if "_mem_" in name}
    assert {"before_init_mem_cpu", "train_mem_cpu_alloc_delta", "eval_mem_cpu_peaked_delta"} <= memory
    assert not any("_mem_" in name for name in results_of(evaluated.folder))


def test_tokens_are_counted_with_padding_or_without(base, tmp_path):
    counted = {}
    for kind in ("all", "non_padding", "no"):
        seen = watch(base, tmp_path / kind, "--packing", "false", "--include_num_input_tokens_seen", kind)
        counted[kind] = results_of(seen.folder).get("num_input_tokens_seen")
    tokens = sum(batch["input_ids"].numel() for _, batch in seen.batches)
    without_padding = sum(seen.trainer.train_dataset["length"][:])
    assert counted == {"all": tokens, "non_padding": without_padding, "no": None}
    assert counted["non_padding"] < counted["all"]


# Checkpoints


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (["steps", "--save_steps", "2"], ["checkpoint-2", "checkpoint-4", "checkpoint-6"]),
        (["epoch"], ["checkpoint-3", "checkpoint-6"]),
        (["no"], []),
        (["epoch", "--save_total_limit", "1"], ["checkpoint-6"]),
        # The loss falls, so that the highest is the first.
        (["best", "--metric_for_best_model", "loss", "--greater_is_better", "true"], ["checkpoint-1"]),
    ],
)
def test_checkpoints_are_there_when_they_are_asked_for(base, tmp_path, strategy, expected):
    watch(base, tmp_path, *EVALUATED, "--num_train_epochs", "2", "--save_strategy", *strategy)
    assert checkpoints_of(tmp_path) == expected


def test_a_resumed_run_skips_what_was_seen_unless_told_not_to(base, tmp_path):
    words = ["--packing", "false", "--max_steps", "3", "--save_steps", "2"]
    whole = watch(base, tmp_path, *words).rows()
    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    assert watch(base, tmp_path, *words, *checkpoint).rows() == whole[8:]
    assert watch(base, tmp_path, *words, *checkpoint, "--ignore_data_skip").rows() == whole[:4]


# Evaluation and prediction from Python


def test_evaluation_can_come_first(base, evaluated, tmp_path):
    log = watch(base, tmp_path, *EVALUATED, "--max_steps", "1", "--eval_on_start").log
    steps = [entry["step"] for entry in log if "eval_loss" in entry]
    assert steps[:2] == [0, 1] and 0 not in [entry["step"] for entry in evaluated.log]


def test_predictions_of_labelled_rows_are_the_logits_and_reach_the_metrics(evaluated, monkeypatch):
    """Rows are padded on the left to their batch's longest, and batches on the right, with -100, to the longest."""
    trainer, rows = evaluated.trainer, evaluated.trainer.eval_dataset
    monkeypatch.setattr(trainer, "compute_metrics", lambda found: {"rows": float(len(found.predictions))})
    output = trainer.predict(rows)
    lengths = rows["length"][:]
    longest, end, length = max(lengths), max(lengths[:6]), lengths[0]
    assert output.predictions.shape == (12, longest, trainer.model.config.vocab_size)
    assert output.label_ids.shape == (12, longest)
    assert output.metrics["test_rows"] == 12
    assert output.metrics["test_loss"] == pytest.approx(evaluated.logged("eval_loss")[-1], rel=ROUNDING)
    alone = trainer.predict(rows.select([0])).predictions
    assert_close(torch.tensor(output.predictions[0, end - length : end]), torch.tensor(alone[0]))
    assert (output.predictions[0, end:] == -100).all() and (output.label_ids[0, end:] == -100).all()


@pytest.mark.parametrize("collator", [TrainingCollator, GenerationCollator])
def test_rows_without_labels_are_predicted(base, evaluated, monkeypatch, collator):
    trainer, rows = evaluated.trainer, evaluated.trainer.eval_dataset
    labelled = trainer.predict(rows).predictions
    monkeypatch.setattr(trainer, "data_collator", collator(AutoTokenizer.from_pretrained(base)))
    output = trainer.predict(rows.remove_columns("labels"))
    assert output.label_ids is None and "test_loss" not in output.metrics
    np.testing.assert_array_equal(output.predictions, labelled)


def launch_two(script: str, *words: str) -> None:
    """The script in two processes on CPUs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    environment |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [warm_python(), script, *words]
    ranks = [environment | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [subprocess.Popen(command, env=rank, stderr=subprocess.PIPE, text=True) for rank in ranks]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


def test_predictions_of_two_processes_are_those_of_one(base, tmp_path, monkeypatch):
    """Of five rows in batches of two, which leaves one process a row less; batches are of unlike lengths."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(train, "PrefixTrainer", train.PrefixTrainer)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["", str(base), str(folders[0])])
    run_predict_logits.main()
    launch_two(run_predict_logits.__file__, str(base), str(folders[1]))
    one, two = (torch.load(folder / "found.pt", weights_only=True) for folder in folders)
    assert [found.pop("processes") for found in (one, two)] == [1, 2]
    assert len(one["predictions"]) == len(one["labels"]) == 5
    for name, value in one.items():
        assert_close(two[name], value)
