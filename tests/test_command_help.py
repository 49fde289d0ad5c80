"""`--help` of the commands, typed: quick, whole, and of this package's own processes alone."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from glm_peft.arguments import TrainingArguments
from glm_peft.command_help import COMMANDS, TRANSFORMERS_FLAGS, _command
from glm_peft.predict_arguments import PredictArguments
from glm_peft.shared_arguments import DataArguments, ModelArguments
from glm_peft.training_defaults import TrainingDefaults

PROJECT = Path(__file__).parents[1]
OWN = {"predict": PredictArguments, "train": TrainingDefaults, "doctor": TrainingDefaults}
OWN_NAMES = {
    command: {field.name for kind in (ModelArguments, DataArguments, own) for field in fields(kind)}
    for command, own in OWN.items()
} | {"convert": {"base", "output_dir", "verify"}}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument_of_the_command_without_importing_torch(command: str):
    words = [f"glm_peft/{command}.py"] if command == "train" else ["-m", f"glm_peft.{command}"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    typed = [sys.executable, "-X", "importtime", *words, "--help"]
    run = subprocess.run(typed, cwd=PROJECT, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0
    assert run.stdout.startswith("usage: ")
    names = OWN_NAMES[command]
    assert [name for name in names if f"--{name}" not in run.stdout] == []
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "peft", "glm_peft.models"}


def test_the_flags_of_transformers_that_help_names_exist():
    named = " ".join(TRANSFORMERS_FLAGS.values()).split()
    assert set(named) - {field.name for field in fields(TrainingArguments)} == set()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["python", "-m", "glm_peft.predict", "--help"], "predict"),
        (["python", "-X", "dev", "-m", "glm_peft.doctor", "--help"], "doctor"),
        (["python", str(PROJECT / "glm_peft" / "train.py"), "--help"], "train"),
        (["python", "-m", "pytest", "glm_peft.predict", "--help"], None),
        (["python", "-m", "glm_peft.metrics", "--help"], None),
        (["python", "-m", "glm_peft_more.predict", "--help"], None),
        (["python", "my_script.py", "--help"], None),
        (["python", "train.py", "--help"], None),
        (["python", "-c", "import glm_peft", "--help"], None),
        (["python"], None),
    ],
)
def test_only_a_command_of_this_package_is_one(words: list[str], command: str | None):
    assert _command(words) == command
