"""`scripts/real_size.py` on a model of two layers: its commands do their work, and the table tells what they took."""

import json
import sys

import pytest
import real_size
from warm_starts import warm_python


def test_a_generation_is_made_trained_asked_and_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_size, "PYTHON", warm_python())
    sizes = "--num_layers 2 --hidden_size 128 --batch_size 2 --max_length 16 --num_virtual_tokens 4 --answer_tokens 2"
    words = ["--output_dir", str(tmp_path), "--generations", "glm4_0414", "--quantization_bit", "4", *sizes.split()]
    monkeypatch.setattr(sys, "argv", ["real_size.py", *words])
    real_size.main()
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert 2 * 2 * 151552 * 128 < row["weights"] < row["foretold"]
    assert row["results"]["train_runtime"] > 0 and row["results"]["predict_samples"] == 1
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert len(cells) == len(real_size.COLUMNS) and cells[:2] == ["| glm4_0414", "4"]
    assert not (tmp_path / "glm4_0414" / "model").exists() and (tmp_path / "glm4_0414" / "adapter").exists()


def test_the_memory_of_a_command_is_watched_and_what_it_says_is_shown_where_it_fails():
    keeps = "import time; kept = bytearray(b'1') * 200_000_000; time.sleep(1.5)"  # many samples, on a busy machine too
    assert real_size.run(["-c", keeps]).allocated > 2e8
    with pytest.raises(SystemExit, match="no such day"):
        real_size.run(["-c", "raise SystemExit('no such day')"])
