"""Real processes under `accelerate launch`, started from tests, which end whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "accelerate_configs"
TRAIN = PROJECT / "glm_peft" / "train.py"
SEVERAL = Path(__file__).parent / "several_commands.py"
"""Runs more than one command of train.py in the same processes, and tells which engine they had."""


def launch(
    config: Path, words: list[str], script: Path = TRAIN, timeout: int = 400, **environment: str
) -> subprocess.CompletedProcess:
    """
    The command under `accelerate launch` with a config file.

    Args:
        words: that follow the script's name.
        timeout: seconds after which all of its processes are killed.
        environment: further variables.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port()), str(script), *words]
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)} | environment
    options = {"text": True, "encoding": "utf-8", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=os.environ | variables, start_new_session=True, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def launch_commands(config: Path, commands: list[list[str]], folder: Path, **environment: str) -> None:
    """
    The commands one after the other in the same processes, as starting these takes longer than a short run.

    Each writes `facts.json` into its `--output_dir`.
    """
    file = folder / "commands.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    done = launch(config, [str(file)], SEVERAL, **environment)
    assert done.returncode == 0, done.stderr[-4000:]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_group(process: subprocess.Popen) -> None:
    """Kill what is left of the processes that were started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
