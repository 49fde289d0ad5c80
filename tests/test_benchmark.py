"""`scripts/benchmark.py`, typed: every variant does its work, and the table has what was measured."""

import json
import subprocess
from pathlib import Path

import benchmark
import benchmark_cases
import pytest
import torch
from benchmark_cases import PREDICTION, TRAINING, measure, useful_flops
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from warm_starts import warm_python

ROOT = Path(__file__).parents[1]
SHORT = "--steps 1 --batch_size 4 --rows 3 --max_new_tokens 2 --num_virtual_tokens 2 --rounds 1"
WORDS = ["--model_name_or_path", "glm_peft/assets", "--train_file", "examples/demo/train.json", *SHORT.split()]
# Compiling is tested where it is done, and takes its time.
JOBS = [("training", name) for name, case in TRAINING.items() if not case.compiled]
JOBS += [("prediction", name) for name in PREDICTION]


@pytest.mark.parametrize(("task", "name"), JOBS)
def test_every_variant_is_measured(task, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(benchmark_cases, "MATRIX", 64)  # a rate that is measured well takes a second
    monkeypatch.setattr(benchmark_cases, "NUMBERS", 2**10)
    measured = measure(task, name, benchmark.parse_arguments(WORDS))
    assert all(value > 0 for key, value in measured.items() if key not in ("batches", "padding, %"))
    assert ("examples/s" if task == "training" else "rows/s") in measured


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
