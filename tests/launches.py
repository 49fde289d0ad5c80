"""Commands in several real processes, and what small runs need; no test itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import glm_peft  # noqa: F401  (registers the generations)

PROJECT = Path(__file__).parents[1]
TWO_PROCESSES = PROJECT / "accelerate_configs" / "multi_gpu.yaml"
LONGEST = 400  # seconds that a launch may take
TRAINING = "--do_train --num_virtual_tokens 4 --use_cpu true --disable_tqdm true --per_device_train_batch_size 2 "
TRAINING += "--logging_steps 1000"


def launch(
    log: Path, script: Path | str, words: list[str], *options: str, config: Path = TWO_PROCESSES
) -> subprocess.Popen:
    """
    The command under `accelerate launch`, as it runs; all that it says is in `log`.

    Args:
        script: a file, or the name of a module.
        words: of the command.
        options: of the launcher; where they are not given, it starts the processes of the config on a free port.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port()), *options]
    command += [str(script)] if isinstance(script, Path) else ["--module", script]
    with log.open("w") as file:
        return subprocess.Popen([*command, *words], env=environment, stdout=file, stderr=subprocess.STDOUT)


def run_launch(log: Path, script: Path | str, words: list[str], *options: str, config: Path = TWO_PROCESSES) -> str:
    """The same to its end, which must be a good one; returns what it said."""
    process = launch(log, script, words, *options, config=config)
    try:
        assert process.wait(timeout=LONGEST) == 0, log.read_text()
    finally:
        process.terminate()
    return log.read_text()


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
