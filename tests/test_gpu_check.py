"""The check on a GPU, every line of it at a small size on the CPU; and what it does where a line fails."""

import json
import os
import subprocess
from pathlib import Path

import gpu_check
import gpu_equality
import pytest
from warm_starts import warm_python

ROOT = Path(__file__).parents[1]
STEP, FLASH = "6B, 16 × 128", "6B, 16 × 1,024, flash"
WORKER = """import json, sys, time
name = sys.stdin.readline()
if "chatglm2" in name:
    sys.exit("CUDA error: an illegal memory access was encountered")
if "chatglm3" in name:
    time.sleep(60)
print("said by a library")
print(json.dumps({"remark": name}))
"""


@pytest.mark.parametrize("name", gpu_check.LINES)
def test_every_line_is_measured(name: str):
    line = gpu_check.LINES[name]
    result = gpu_check.measure(line, small=True)
    remark = str(result.pop("remark"))
    assert remark.startswith("not here: ") == (line.attention is not None)
    assert all(value > 0 for value in result.values()) and set(result) <= set(gpu_check.COLUMNS)
    assert ("tokens/s" in result) == (line.kind != "equal" and not line.attention)
    assert ("s a step" in result) == (line.kind == "step" and not line.attention)


def test_what_is_not_equal_to_the_cpu_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gpu_equality.WAYS, "bfloat16", ({"dtype": "bfloat16"}, 1e-6))
    with pytest.raises(AssertionError, match="^bfloat16 too far from the CPU: sdpa 0, "):
        gpu_equality.compare_with_cpu("chatglm3", tmp_path, has_gpu=False)


def test_the_others_go_on_where_a_line_fails_hangs_or_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(gpu_check, "__file__", str(worker))
    monkeypatch.setattr(gpu_check, "MOST_SECONDS", 3)
    names = [f"equal to the CPU, {generation}" for generation in ("chatglm", "chatglm2", "chatglm3", "glm4")]
    remarks = [result["remark"] for _, result in gpu_check.run_lines(gpu_check.parse_arguments(["--lines", *names]))]
    failed = "FAILED: exit code 1; CUDA error: an illegal memory access was encountered"
    assert remarks == [names[0], failed, "FAILED: not done after 3 s", names[3]]
    late = gpu_check.run_lines(gpu_check.parse_arguments(["--lines", names[0], "--seconds", "0"]))
    assert list(late) == [(names[0], {"remark": "not begun: the time is up"})]


def test_the_command_prints_one_table_and_writes_its_numbers(tmp_path: Path):
    environment = os.environ | {"PYTHON": warm_python(), "OUT": str(tmp_path), "WHEELS": str(tmp_path / "none")}
    command = ["bash", "scripts/gpu_check.sh", "--small", "--lines", STEP, FLASH]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    title, rule, step, flash = (line for line in run.stdout.splitlines() if line.startswith("|"))
    assert step.startswith(f"| {STEP} | ") and flash.startswith(f"| {FLASH} |  |  |  |  |  | not here: ")
    assert title.count("|") == rule.count("|") == step.count("|") == len(gpu_check.COLUMNS) + 2
    written = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert list(written["lines"]) == [STEP, FLASH] and written["machine"]["device"]
