"""`scripts/cost_growth.py`: one thing is changed at a time, and what is drawn is what was measured."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import cost_growth
import pytest
from warm_starts import warm_python

ROOT = Path(__file__).parents[1]
TRAIN_FILE = ROOT / "examples" / "demo" / "train.json"


def fake_measure(asked: list[dict[str, int]]):
    def measure(setting, arguments):
        asked.append(setting)
        return {"CPU s a step": float(setting["batch"]), "peak memory, MiB": float(setting["vocabulary"])}

    return measure


def test_one_thing_is_changed_at_a_time_and_nothing_is_measured_twice(monkeypatch, tmp_path, capsys):
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(cost_growth, "measure", fake_measure(asked))
    monkeypatch.setattr(sys, "argv", ["cost_growth.py", "--train_file", "x.json", "--output_dir", str(tmp_path)])
    cost_growth.main()
    assert all(sum(setting[axis] != usual for axis, usual in cost_growth.USUAL.items()) <= 1 for setting in asked)
    assert len({tuple(setting.values()) for setting in asked}) == len(asked) == 13
    said = capsys.readouterr().out
    assert "| batch | 32 | 32.00 | 130,528 |" in said and "| vocabulary | 16,316 | 16.00 | 16,316 |" in said
    assert json.loads((tmp_path / "cost_growth.json").read_text())["batch"]["4"]["CPU s a step"] == 4
    assert (tmp_path / cost_growth.PLOT_NAME).stat().st_size > 10_000


def test_rows_have_all_the_tokens_that_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", warm_python())
    arguments = Namespace(train_file=TRAIN_FILE, output_dir=tmp_path, hidden_size=32, num_layers=1, steps=1)
    setting = {"batch": 2, "tokens of a row": 96, "virtual tokens": 2, "vocabulary": 2048}
    measured = cost_growth.measure(setting, arguments)
    assert measured["CPU s a step"] > 0 and measured["peak memory, MiB"] > 0
    whole = json.loads((tmp_path / "benchmark.json").read_text())["training"]["toolkit"]
    tokens = whole["tokens/s"] * whole["s a step"]
    assert tokens == pytest.approx(2 * 96) and whole["padding, %"] == pytest.approx(0, abs=1e-9)


def test_the_command_tells_its_options():
    command = [warm_python(), "scripts/cost_growth.py", "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--hidden_size" in said and "--train_file" in said
