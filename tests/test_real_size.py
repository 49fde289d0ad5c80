"""`scripts/real_size.py` on a model of one layer: its commands do their work, and the table tells what they took."""

import json
import re
import sys
from functools import partial

import pytest
import real_size
import real_size_commands
from real_size_commands import ask_server, run
from warm_starts import warm_python

SIZES = "--num_layers 1 --hidden_size 128 --batch_size 2 --max_length 16 --num_virtual_tokens 4 --answer_tokens 2"


def measure(folder, monkeypatch, capsys, *words):
    """Run the script; return its exit code, the rows of its file, and the cells of its table by their titles."""
    monkeypatch.setattr(real_size_commands, "PYTHON", warm_python())
    monkeypatch.setattr(sys, "argv", ["real_size.py", "--output_dir", str(folder), *SIZES.split(), *words])
    with pytest.raises(SystemExit) as end:
        real_size.main()
    said = capsys.readouterr()
    titles, _, *table = [line.strip("| ").split(" | ") for line in said.out.splitlines()]
    rows = list(map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()))
    return int(end.value.code), rows, [titles, *table], said.err


def test_a_generation_is_made_once_and_loaded_trained_asked_and_served(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(real_size.SIZES, "glm4_0414", (1, 4096, 2048))  # less of an embedding table to write and read
    words = ["--generations", "glm4_0414", "--precisions", "4", "--formats", "safetensors", "bin"]
    code, (row,), (titles, cells), progress = measure(tmp_path, monkeypatch, capsys, *words)
    assert code == 0 and len(cells) == len(titles) and cells[0] == "glm4_0414" and cells[1].startswith("4 (")
    assert all(float(cell.replace(",", "")) >= 0 for cell in cells[2:])
    assert 2 * 2 * 2048 * 128 < row["made"]["weights"] < row["foretold"]["total"]
    assert row["trained"]["results"]["train_runtime"] > 0 and row["answered"]["results"]["predict_samples"] == 1
    assert all(0 < row[f"loaded_{name}"]["loading"] < row[f"loaded_{name}"]["seconds"] for name in real_size.FORMATS)
    assert all(row["served"][name] > 0 for name in ("up", "first", "second", "ended"))
    assert len(re.findall(r"^\d\d:\d\d:\d\d \w+: see .*\.log$", progress, re.MULTILINE)) == 7
    folder = tmp_path / "glm4_0414"
    assert (
        not (folder / "safetensors").exists() and not (folder / "bin").exists() and (folder / "4" / "adapter").exists()
    )


def test_what_fails_stands_in_its_cell_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    words = ["--generations", "chatglm", "chatglm3", "--precisions", "float32", "--num_virtual_tokens", "0"]
    monkeypatch.setitem(real_size.SIZES, "chatglm", (1, 4096, "many"))
    monkeypatch.setitem(real_size.SIZES, "chatglm3", (1, 4096, 2048))
    code, (unmade, row), (titles, first, second), _ = measure(tmp_path, monkeypatch, capsys, *words)
    assert code == 1 and "loaded_safetensors" not in unmade and "'many'" in first[titles.index("weights, GB")]
    failed = "failed: error: --num_virtual_tokens must be at least 1, found 0."
    assert second[titles.index("training: start and loading, s")] == row["trained"]["failed"] == failed
    assert row["answered"]["seconds"] > 0 and row["served"]["second"] > 0  # the base alone
    assert not list(tmp_path.glob("*/safetensors"))


def test_a_command_is_watched_and_one_that_fails_or_takes_too_long_says_so(tmp_path):
    log = tmp_path / "said.log"
    keeps = "import time; kept = bytearray(b'1') * 200_000_000; time.sleep(1.5)"  # many samples, on a busy machine too
    assert run(["-c", keeps], log, 60)["allocated"] > 2e8
    assert run(["-c", "print(1); raise SystemExit('no such day')"], log, 60)["failed"] == "failed: no such day"
    assert run(["-c", "raise SystemExit(3)"], log, 60)["failed"] == "failed: exit code 3"
    assert run(["-c", "import os; os.kill(os.getpid(), 9)"], log, 60)["failed"] == "failed: SIGKILL"
    assert run(["-c", "import time; time.sleep(60)"], log, 0.5)["failed"] == "not done in 0.5 s"


STAYS = """
import http.server, signal
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    do_POST = do_GET
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(f"address: http://127.0.0.1:{server.server_port}/v1 ", flush=True)
server.serve_forever()
"""


def test_a_server_that_does_not_end_is_killed_and_its_figures_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(real_size_commands, "MOST_TO_END", 0.2)
    attend = partial(ask_server, model="base", questions=["", ""], answer_tokens=1)
    figures = run(["-c", STAYS], tmp_path / "served.log", 60, attend)
    assert figures["failed"] == "failed: still running 0.2 s after Ctrl-C" and figures["second"] > 0
    ended = run(["-c", "print('no port')"], tmp_path / "served.log", 60, attend)
    assert ended["failed"] == "failed: no port" and "up" not in ended
