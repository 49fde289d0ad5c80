"""`--help` of the commands, typed: quick, whole, and of this package's own processes alone."""

import io
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from warm_starts import warm_python

from glm_peft.arguments.chat import ChatArguments
from glm_peft.arguments.command_help import COMMANDS, _command
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.distil import DistilArguments
from glm_peft.arguments.inspection import InspectArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import PredictArguments
from glm_peft.arguments.push import PushArguments
from glm_peft.arguments.search import SearchArguments
from glm_peft.arguments.serve import ServeArguments
from glm_peft.arguments.training import TrainingArguments
from glm_peft.arguments.training_defaults import TrainingDefaults
from glm_peft.arguments.transformers_flags import MOST_USED
from glm_peft.arguments.web import WebArguments
from glm_peft.reporting.exits import exit_with_user_errors

PROJECT = Path(__file__).parents[1]
OWN = {"predict": PredictArguments, "train": TrainingDefaults, "doctor": TrainingDefaults, "search": SearchArguments}
OWN["distil"] = DistilArguments
OWN_NAMES = {
    command: {field.name for kind in (ModelArguments, DataArguments, own) for field in fields(kind)}
    for command, own in OWN.items()
} | {
    "convert": {"base", "output_dir", "verify"},
    "inspect_adapter": {field.name for field in fields(InspectArguments)},
    "push": {field.name for field in fields(PushArguments)},
    "recipes": {"help"},
}
OF_TRAINING = {"prefix_init", "prefix_init_text", "prefix_init_std", "prefix_dropout", "save_tokenizer", "train_file"}
OF_TRAINING |= {"validation_file", "max_train_samples", "max_eval_samples", "packing", "max_length", "train_on"}
OF_TRAINING |= {"validation_split", "stopping_strategy", "rows_seed", "streaming", "shuffle_buffer_size"}
OF_TRAINING |= {"peft_type", "lora_rank", "lora_alpha", "lora_dropout", "target_modules"}
OF_TRAINING |= {"ignore_pad_token_for_loss", "num_virtual_tokens", "prefix_projection", "encoder_hidden_size"}
OWN_NAMES["chat"] = {field.name for kind in (ModelArguments, ChatArguments) for field in fields(kind)} - OF_TRAINING
OWN_NAMES["serve"] = {field.name for kind in (ModelArguments, ServeArguments) for field in fields(kind)} - OF_TRAINING
OWN_NAMES["web"] = {field.name for kind in (ModelArguments, WebArguments) for field in fields(kind)} - OF_TRAINING
OWN_NAMES["predict"] -= OF_TRAINING | {"overwrite_cache"}


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
    flags = set(run.stdout.split())
    assert [name for name in OF_TRAINING if f"--{name}" in flags] == [] or command in (
        "train",
        "distil",
        "doctor",
        "search",
    )
    assert command != "predict" or "None: the base alone." in " ".join(run.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "peft", "glm_peft.models"}


@pytest.mark.parametrize(
    ("words", "code"),  # argparse takes no notice where there is no buffer, or it is full
    [("-m glm_peft.predict --help", (0, 141)), ("-m glm_peft.convert --help", (0, 141)), ("-c {script}", (141,))],
)
def test_a_reader_that_has_read_enough_ends_a_command_quietly(words: str, code: tuple[int, ...]):
    script = "from glm_peft.reporting.exits import exit_with_user_errors\n"
    script += "with exit_with_user_errors():\n for n in range(99999): print(n)"
    program = warm_python() if words.startswith("-c") else sys.executable
    typed = [program, *(word.format(script=script) for word in words.split())]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(typed, cwd=PROJECT, env=environment, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() in code


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"\\u6d77\\U0001f600\n"), ("gbk", b"\xba\xa3\\U0001f600\n")]
)
def test_a_console_without_the_characters_of_an_answer_gets_it_with_replacements(monkeypatch, encoding, shown):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", console)
    with exit_with_user_errors():
        print("海😀")
    assert console.buffer.getvalue() == shown


def test_another_pipe_that_broke_is_no_reader_that_has_read_enough():
    with pytest.raises(BrokenPipeError), exit_with_user_errors():
        raise BrokenPipeError


def test_the_flags_of_transformers_that_help_names_exist():
    named = " ".join(MOST_USED.values()).split()
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
        (["python", "/some/bin/glm-peft", "train", "--help"], "train"),
        (["python", "-m", "glm_peft", "doctor", "--help"], "doctor"),
        (["python", "/some/bin/glm-peft", "--help"], None),
    ],
)
def test_only_a_command_of_this_package_is_one(words: list[str], command: str | None):
    assert _command(words) == command
