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
from glm_peft.arguments.command_help import COMMANDS, _command, _read
from glm_peft.arguments.command_line import _Parser
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.distil import DistilArguments, parse_distil_arguments
from glm_peft.arguments.doctor import parse_doctor_arguments
from glm_peft.arguments.inspection import InspectArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import PredictArguments
from glm_peft.arguments.push import PushArguments
from glm_peft.arguments.search import SearchArguments, parse_search_arguments
from glm_peft.arguments.serve import ServeArguments
from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.arguments.training_defaults import TrainingDefaults
from glm_peft.arguments.transformers_flags import MOST_USED
from glm_peft.arguments.transformers_source import trainer_flags
from glm_peft.arguments.web import WebArguments
from glm_peft.errors import UserError
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
OF_TRAINING |= {"objective"}
OWN_NAMES["chat"] = {field.name for kind in (ModelArguments, ChatArguments) for field in fields(kind)} - OF_TRAINING
OWN_NAMES["serve"] = {field.name for kind in (ModelArguments, ServeArguments) for field in fields(kind)} - OF_TRAINING
OWN_NAMES["web"] = {field.name for kind in (ModelArguments, WebArguments) for field in fields(kind)} - OF_TRAINING
OWN_NAMES["predict"] -= OF_TRAINING | {"overwrite_cache"}


def type_traced(command: str, flag: str) -> subprocess.CompletedProcess[str]:
    """What a command says to a flag, with its imports on stderr."""
    words = [f"glm_peft/{command}.py"] if command == "train" else ["-m", f"glm_peft.{command}"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    typed = [sys.executable, "-X", "importtime", *words, flag]
    return subprocess.run(typed, cwd=PROJECT, env=environment, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument_of_the_command_without_importing_torch(command: str):
    run = type_traced(command, "--help")
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
    assert command != "predict" or "Not given: the base alone." in " ".join(run.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "peft", "glm_peft.models"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_told_without_importing_transformers(command: str):
    run = type_traced(command, "--seed_of_doubt=1")
    assert run.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "peft", "numpy", "glm_peft.models"}
    said = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    own = "error: --seed_of_doubt: there is no such argument, "
    of_argparse = f"python -m glm_peft.{command}: error: "
    assert said[-1].startswith(of_argparse if command in ("convert", "recipes") else own)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --model_name_or_path b --num_train_epochs x", "--num_train_epochs: invalid float value: 'x'; --help "),
        ("train --model_name_or_path b --do_train", "--output_dir is not given: "),
        ("train --model_name_or_path b --output_dir o", "There is nothing to do: "),
        ("train --model_name_or_path b --output_dir o --do_train", "--do_train needs data: "),
        ("train configs/demo.yaml --early_stopping_patience 2 --eval_strategy no", "--early_stopping_patience 2 "),
        ("doctor --model_name_or_path b --do_eval maybe", "--do_eval: Truthy value expected: "),
        ("doctor --model_name_or_path b", "There is nothing to examine: "),
        ("distil --model_name_or_path b --document d", "--output_dir is not given: "),
        ("distil --model_name_or_path b --document d --output_dir o --do_predict", "--do_predict has no meaning here"),
        ("search --model_name_or_path b --output_dir o --space s", "A search trains and evaluates every trial: "),
        ("predict --model_name_or_path b --prompt p --do_train", "--do_train is for training: "),
        ("serve --model_name_or_path b --port high", "--port: invalid int value: 'high'; --help "),
    ],
)
def test_early_answers_are_those_of_the_full_parser(monkeypatch, words: str, said: str):
    command, *rest = words.split()
    monkeypatch.chdir(PROJECT)
    with pytest.raises(UserError) as early:
        _read(command, rest)
    assert str(early.value).startswith(said)
    parsers = {"distil": parse_distil_arguments, "doctor": parse_doctor_arguments, "search": parse_search_arguments}
    if command in parsers or command == "train":
        with pytest.raises(UserError) as full:
            parsers.get(command, parse_train_arguments)(rest)
        assert str(full.value) == str(early.value)


@pytest.mark.parametrize(
    "words",
    [
        *(str(path) for path in (PROJECT / "configs").glob("[ad]*.yaml")),
        "--model_name_or_path b --output_dir o --eval_strategy steps --dataset_name d --fsdp --debug a b",
    ],
)
def test_what_training_accepts_is_not_refused_early(monkeypatch, words: str):
    monkeypatch.chdir(PROJECT)
    _read("train", words.split())


def test_the_flags_read_off_the_source_are_those_of_transformers():
    own, stock = [_Parser([kind], {}, {}) for kind in (trainer_flags(TrainingDefaults), TrainingArguments)]
    assert own.names == stock.names
    pairs = [sorted(parser._actions, key=lambda action: action.option_strings) for parser in (own, stock)]
    for read, true in zip(*pairs, strict=True):
        assert (read.option_strings, read.nargs, read.const) == (true.option_strings, true.nargs, true.const)
        # What the source does not say outright is left open.
        assert read.default in (None, true.default)
        assert read.choices in (None, true.choices)
        assert read.type in (str, true.type) or read.choices


def test_one_prompt_and_the_doctor_import_neither_scores_nor_pictures_nor_a_trainer():
    script = """import runpy, sys
sys.argv = "predict --model_name_or_path glm_peft/assets --prompt ? --max_new_tokens 1".split()
runpy.run_module("glm_peft.predict", run_name="__main__")
print(*sys.modules)
import glm_peft.doctor
print(*sys.modules)"""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment, capture_output=True, encoding="utf-8"
    )
    *_, of_prompt, of_doctor = (set(line.split()) for line in run.stdout.splitlines())
    unwanted = {"jieba", "nltk", "rouge_chinese", "evaluate", "matplotlib", "glm_peft.training.trainer"}
    unwanted |= {"datasets", "pandas", "pyarrow", "transformers.trainer"}
    assert "glm_peft.doctor" in of_doctor and not unwanted & of_doctor
    unwanted |= {"transformers.training_args", "glm_peft.training"}
    assert "peft" in of_prompt and not unwanted & of_prompt


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
    assert _command(words)[0] == command
    assert command is None or _command([*words, "predict"])[1] == ["--help", "predict"]
