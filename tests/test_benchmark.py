"""`scripts/benchmark.py`, typed: every variant does its work, and the table has what was measured."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import benchmark
import benchmark_cases
import pytest
import torch
from benchmark_answers import PREDICTION
from benchmark_cases import ALL_FLOAT32, TRAINING, useful_flops
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from warm_starts import warm_python

from glm_peft.errors import UserError
from glm_peft.preprocessing.batching import GROUPING, LengthGroupedSampler

ROOT = Path(__file__).parents[1]
SHORT = "--steps 1 --batch_size 2 --gradient_accumulation_steps 2 --rows 3 --max_new_tokens 2 --rounds 1"
WORDS = ["--model_name_or_path", "glm_peft/assets", "--train_file", "examples/demo/train.json", *SHORT.split()]
WORDS += ["--num_virtual_tokens", "2"]
# Compiling is tested where it is done, and takes its time.
JOBS = [("training", name) for name, case in TRAINING.items() if not case.compiled]
JOBS += [("prediction", name) for name in PREDICTION]
WORKER = """import json, os, signal, sys
name = sys.argv[-1].split(":")[1]
if name == "published way":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "plain PEFT":
    sys.exit("said before" + chr(10) + "MemoryError: 3 | 4 bytes")
print("said by a library")
print(json.dumps({"s a step": 2.5, "batches": "Batches are so."}))
"""


@pytest.mark.parametrize(("task", "name"), JOBS)
def test_every_variant_is_measured(task, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(benchmark_cases, "MATRIX", 64)  # a rate that is measured well takes a second
    monkeypatch.setattr(benchmark_cases, "NUMBERS", 2**10)
    measured = benchmark.measure(task, name, benchmark.parse_arguments(WORDS))
    assert all(value > 0 for key, value in measured.items() if key not in ("batches", "padding, %"))
    assert 0 < measured["peak of loading, MiB"] <= measured["peak memory, MiB"] and measured["load, s"] > 0
    assert torch.cuda.is_available() or measured["allocated, MiB"] < measured["peak memory, MiB"]
    if task == "training":
        assert measured["examples/s"] * measured["s a step"] == pytest.approx(2 * 2)
    else:
        assert "rows/s" in measured


def test_what_stock_would_load_is_in_one_precision(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("glm_peft.models.loading.has_fast_bfloat16", lambda: False)
    asked, load = [], benchmark_cases.load_base_model
    monkeypatch.setattr(benchmark_cases, "load_base_model", lambda args: asked.append(args.dtype) or load(args))
    names = ("toolkit", ALL_FLOAT32, "published way", "plain PEFT")
    for dtype in ("auto", "bfloat16"):
        arguments = benchmark.parse_arguments([*WORDS, "--dtype", dtype])
        for name in names:
            benchmark_cases.build_model(arguments, TRAINING[name])
        jobs = benchmark.list_jobs(arguments)
        assert [(task, ALL_FLOAT32) in jobs for task in ("training", "prediction")] == [dtype == "auto"] * 2
    assert asked == ["auto", *["float32"] * 3, *["bfloat16"] * 4]
    assert {PREDICTION[name].kept_weights for name in names[1:]} == {False}


def test_a_variant_that_fails_says_why_in_its_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    worker, file = tmp_path / "worker.py", tmp_path / "results.json"
    worker.write_text(WORKER)
    words = ["--tasks", "training", "--rounds", "2", "--output_file", str(file), "--variants"]
    words += ["toolkit", "plain PEFT", "published way"]
    monkeypatch.setattr("sys.argv", [str(worker), *WORDS, *words])
    with pytest.raises(SystemExit, match="^failed: training, published way; training, plain PEFT$"):
        benchmark.main()
    said, told = capsys.readouterr()
    assert said.splitlines()[2:] == [
        "| toolkit | 2.5 |",
        "| published way | failed: killed by SIGKILL |",
        "| plain PEFT | failed: MemoryError: 3 \\| 4 bytes |",
        "Batches are so.",
        "",
    ]
    assert told.count("said before") == 1  # it is not tried again
    rows = json.loads(file.read_text(encoding="utf-8"))["training"]
    assert rows["toolkit"]["s a step"] == 2.5 and rows["published way"] == {"failed": "killed by SIGKILL"}


def test_what_is_measured_is_written_before_the_next_begins(tmp_path, monkeypatch):
    measured = iter([{"s a step": 2.5}])  # as if Ctrl-C came in the second
    monkeypatch.setattr(benchmark, "run_worker", lambda job: next(measured))
    words = ["--tasks", "training", "--variants", "toolkit", "plain PEFT", "--output_file", str(tmp_path / "file")]
    monkeypatch.chdir(ROOT)
    with pytest.raises(StopIteration):
        benchmark.run_rounds(benchmark.parse_arguments([*WORDS, *words]))
    assert json.loads((tmp_path / "file").read_text())["training"] == {"toolkit": {"s a step": 2.5}}


def test_examples_are_grouped_by_whole_steps_as_the_trainer_does(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = benchmark.parse_arguments([*WORDS, "--steps", "9"])
    setting, model = (
        benchmark_cases.load_setting(arguments),
        benchmark_cases.build_model(arguments, TRAINING["toolkit"])[0],
    )
    plan = benchmark_cases.plan_batching
    monkeypatch.setattr(benchmark_cases, "plan_batching", lambda *words: replace(plan(*words), order=GROUPING))
    batches, _ = benchmark_cases.plan_batches(setting, TRAINING["toolkit"], model, arguments)
    lengths = setting.examples["length"][:]
    sampler = LengthGroupedSampler(lengths, 2 * 2, seed=0, get_epoch=lambda: 0)
    order = torch.tensor(lengths)[list(sampler)].view(-1, 2).sum(dim=1)
    assert [int(batch["real_tokens"]) for batch in batches] == order.tolist()


def test_too_few_examples_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = benchmark.parse_arguments([*WORDS, "--steps", "100000"])
    with pytest.raises(UserError, match="has [0-9]+ examples and 100000 \\+ 1 steps need 400004: "):
        benchmark.measure("training", "toolkit", arguments)


def test_the_command_writes_a_table_and_a_file(tmp_path):
    file = tmp_path / "results.json"
    more = ["--variants", "toolkit", "plain PEFT", "--log_normal", "40", "0.8", "--output_file", str(file)]
    command = [warm_python(), "scripts/benchmark.py", *WORDS, *more]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    results = json.loads(file.read_text(encoding="utf-8"))
    assert list(results["training"]) == list(results["prediction"]) == ["toolkit", "plain PEFT"]
    rows = [line for line in said.splitlines() if line.startswith(("| toolkit |", "| plain PEFT |"))]
    assert len(rows) == 4 and "Batches are " in said


def test_a_model_of_a_shape_is_made_once(tmp_path):
    words = ["--shape", "small", "--num_layers", "1", "--model_name_or_path", str(tmp_path / "model")]
    arguments = benchmark.parse_arguments([*words, "--train_file", "rows.json"])
    benchmark.make_model(arguments)
    benchmark.make_model(arguments)  # which would refuse a folder that is not empty
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_layers"], config["vocab_size"], config["hidden_size"]) == (1, 130528, 256)


def test_useful_operations_are_those_of_the_products_with_weights(reference_models):
    base = AutoModelForCausalLM.from_pretrained(reference_models / "chatglm2-6b")
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    matrices = [value for name, value in base.named_parameters() if name.split(".")[-2] in names and value.dim() == 2]
    head = base.get_output_embeddings().weight
    with torch.no_grad():
        assert useful_flops(model, 10, 3) == 4 * (10 * sum(map(torch.numel, matrices)) + 3 * head.numel())
