"""Commands in several real processes, and what small runs need; no test itself."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from warm_starts import warm_python

import glm_peft  # noqa: F401  (registers the generations)

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "accelerate_configs"
TWO_PROCESSES, TWO_MACHINES = CONFIGS / "multi_gpu.yaml", CONFIGS / "two_machines.yaml"
TRAIN = PROJECT / "glm_peft" / "train.py"
SEVERAL = Path(__file__).parent / "several_commands.py"
"""Runs more than one command of train.py in the same processes, and tells which engine they had."""
LONGEST = 400  # seconds that a launch may take
TRAINING = "--do_train --num_virtual_tokens 4 --use_cpu true --disable_tqdm true --per_device_train_batch_size 2 "
TRAINING += "--logging_steps 1000"


def launch(
    log: Path,
    script: Path | str,
    words: list[str],
    *options: str,
    config: Path = TWO_PROCESSES,
    environment: Mapping[str, str] | None = None,
    knows: str = "glm_peft",
) -> subprocess.Popen:
    """
    The command under `accelerate launch`, as it runs; all that it says is in `log`.

    Args:
        script: a file, or the name of a module.
        words: of the command.
        options: of the launcher; where they are not given, it starts the processes of the config on a free port.
        environment: further variables.
        knows: what launcher and processes need not import; see warm_starts.py.
    """
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)} | (environment or {})
    command = [warm_python(knows), "-m", "accelerate.commands.launch"]
    command += ["--quiet", "--config_file", str(config), "--main_process_port", str(free_port()), *options]
    command += [str(script)] if isinstance(script, Path) else ["--module", script]
    into = {"stderr": subprocess.STDOUT, "start_new_session": True}
    with log.open("w") as file:
        return subprocess.Popen([*command, *words], env=os.environ | variables, stdout=file, **into)


def end(process: subprocess.Popen, log: Path, timeout: float = LONGEST) -> tuple[int, str]:
    """What a launch ends with, within `timeout` seconds, and what it said; none of its processes is left."""
    try:
        return process.wait(timeout), log.read_text()
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """All that is left of the processes that were started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_launch(log: Path, script: Path | str, words: list[str], *options: str, **settings: Any) -> str:
    """A launch to its end, which must be a good one; returns what it said."""
    code, said = end(launch(log, script, words, *options, **settings), log)
    assert code == 0, said
    return said


def run_commands(
    folder: Path, commands: list[list[str]], config: Path, environment: Mapping[str, str] | None = None
) -> None:
    """
    The commands one after the other in the same processes, as starting these takes longer than a short run.

    Each writes `facts.json` into its `--output_dir`.
    """
    file = folder / "commands.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    run_launch(folder / "log", SEVERAL, [str(file)], config=config, environment=environment)


def on_two_machines(folder: Path, first: list[str], second: list[str] | None = None) -> list[tuple[int, str]]:
    """train.py in two launches on the loopback address, as on two machines: how each ended, and what it said."""
    options = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"]
    logs = [folder / f"machine_{rank}" for rank in (0, 1)]
    processes = [
        launch(log, TRAIN, words, *options, str(rank), config=TWO_MACHINES)
        for rank, (log, words) in enumerate(zip(logs, (first, second or first), strict=True))
    ]
    try:
        return [end(process, log) for process, log in zip(processes, logs, strict=True)]
    finally:
        for process in processes:
            kill(process)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_rows(file: Path, number: int) -> Path:
    """A file of so many rows, of many lengths."""
    rows = [
        {"content": f"第{i}件" + "衬衫" * (i * 7 % 11), "summary": "白色" * (1 + i * 5 % 7)} for i in range(number)
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter whose prefix is drawn, so that every prompt has an answer of its own."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
