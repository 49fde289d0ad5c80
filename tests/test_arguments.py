"""Every argument of training: names, files, defaults, refusals."""

import json
import logging
import os
import pickle
import re
import subprocess
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from data_fakes import DEFAULTS
from transformers import Seq2SeqTrainingArguments
from warm_starts import warm_python

from glm_peft.__main__ import launch
from glm_peft.arguments.command_line import names_of_fields
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import facts_of
from glm_peft.arguments.former_options import IGNORED, REFUSED, RENAMED
from glm_peft.arguments.inspection import InspectArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import PredictArguments, parse_predict_arguments
from glm_peft.arguments.search import SearchArguments
from glm_peft.arguments.settings import read_config
from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.arguments.transformers_flags import FACTS
from glm_peft.errors import UserError
from glm_peft.metrics import PROTOCOLS
from glm_peft.models.chat_formats import CHAT_FORMATS
from glm_peft.prediction.generation_settings import GenerationSettings

ROOT = Path(__file__).parents[1]
NEEDED = {"model_name_or_path": "base", "output_dir": "out", "do_train": "true", "train_file": "train.json"}


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    """Arguments as one process on a CPU has them, whatever started the tests."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("RANK", raising=False)


def flags(**changes: str | None) -> list[str]:
    """A command line with everything that is needed; `None` takes an argument away."""
    values = {name: value for name, value in {**NEEDED, **changes}.items() if value is not None}
    return [f"--{name}={value}" for name, value in values.items()]


def parse(*words: str, **changes: str | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    return parse_train_arguments([*flags(**changes), *words])


def refusal(*words: str, **changes: str | None) -> str:
    with pytest.raises(UserError) as error:
        parse(*words, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config(tmp_path: Path):
    """Writes a configuration file and gives its name."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


NEEDED_YAML = "".join(f"{name}: {value}\n" for name, value in NEEDED.items())


# Files and flags


def test_flags_win_over_the_file(config):
    file = config(NEEDED_YAML + "max_steps: 5\nlearning_rate: 0.1\n")
    _, _, training_args = parse_train_arguments([file, "--max_steps", "7"])
    assert (training_args.max_steps, training_args.learning_rate) == (7, 0.1)


def test_a_flag_wins_over_the_file_under_another_name_of_the_argument(config):
    file = config(NEEDED_YAML + "num_virtual_tokens: 64\n")
    assert parse_train_arguments([file, "--pre_seq_len", "32"]).model.num_virtual_tokens == 32


def test_a_flag_can_set_a_stock_default_again(config):
    file = config(NEEDED_YAML + "quantization_bit: 4\nprefix_projection: true\n")
    model_args, _, _ = parse_train_arguments([file, "--quantization_bit", "0", "--prefix_projection", "false"])
    assert (model_args.quantization_bit, model_args.prefix_projection) == (None, False)


def test_yaml_scalars_are_read_as_they_are_written(config):
    file = config(NEEDED_YAML + "learning_rate: 2e-2\neval_strategy: no\nsource_prefix: '- 写'\nrun_name: 1.10\n")
    _, data_args, training_args = parse_train_arguments([file])
    assert (training_args.learning_rate, training_args.eval_strategy) == (0.02, "no")
    assert (data_args.source_prefix, training_args.run_name) == ("- 写", "1.10")


def test_null_in_a_file_means_the_default(config):
    file = config(NEEDED_YAML + "max_train_samples: null\nlearning_rate: ~\n")
    _, data_args, training_args = parse_train_arguments([file])
    assert (data_args.max_train_samples, training_args.learning_rate) == (None, 5e-3)


def test_json_is_read_like_yaml(config):
    values = {**NEEDED, "do_train": True, "learning_rate": 2e-2, "report_to": ["none"], "max_train_samples": None}
    _, data_args, training_args = parse_train_arguments([config(json.dumps(values), "recipe.json")])
    assert (training_args.do_train, training_args.learning_rate, training_args.report_to) == (True, 0.02, [])
    assert data_args.max_train_samples is None


def test_a_file_may_hold_lists_and_mappings(config):
    text = "label_names: [labels, other]\nlr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    _, _, training_args = parse_train_arguments([config(NEEDED_YAML + text)])
    assert training_args.label_names == ["labels", "other"]
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if path.name != "search_space.yaml")
)
def test_every_recipe_is_read_and_names_its_own_command(name):
    model_args, data_args, training_args = parse_train_arguments([str(ROOT / "configs" / name)])
    assert training_args.do_train and data_args.train_file
    assert (model_args.num_virtual_tokens is None) == name.endswith("_lora.yaml")
    assert f"glm_peft/train.py configs/{name}" in (ROOT / "configs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["adgen_chatglm", "adgen_chatglm2", "adgen_chatglm3", "adgen_glm4", "adgen_glm4_0414"]
)
def test_recipes_hold_the_published_settings(name):
    model_args, _, training_args = parse_train_arguments([str(ROOT / "configs" / f"{name}.yaml")])
    assert (model_args.num_virtual_tokens, model_args.quantization_bit) == (128, 4)
    assert (training_args.learning_rate, training_args.max_steps, training_args.warmup_steps) == (2e-2, 3000, 0)
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 16
    assert (training_args.do_sample, training_args.top_p, training_args.temperature) == (True, 0.7, 0.95)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*_lora.yaml")), ids=lambda file: file.stem)
def test_a_recipe_of_lora_differs_from_that_of_the_prefix_by_the_method_alone(file):
    own, prefix = (
        {setting.name: setting.values for setting in read_config(str(recipe))}
        for recipe in (file, file.with_stem(file.stem.removesuffix("_lora")))
    )
    differing = {name for name in {*own, *prefix} if own.get(name) != prefix.get(name)}
    of_lora = {"peft_type", "lora_rank", "lora_alpha", "target_modules"}
    assert differing - of_lora - {"num_virtual_tokens", "prefix_dropout"} == {"learning_rate", "output_dir"}
    assert own["output_dir"][0].startswith(os.path.dirname(prefix["output_dir"][0]))


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu"])
def test_accelerate_configurations_launch_without_a_word(name, tmp_path):
    script = tmp_path / "nothing.py"
    script.write_text("import os; print('cpu', os.environ['ACCELERATE_USE_CPU'])")
    command = [warm_python("torch"), "-m", "accelerate.commands.launch", "--config_file"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "unset"}
    file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    run = subprocess.run([*command, file, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split("\n")[0] == {"cpu": "cpu True", "single_gpu": "cpu False"}.get(name, "cpu unset")


# Refused files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rat: 1\n",
            "recipe.yaml, line 5, learning_rat: there is no such argument, the nearest is learning_rate",
        ),
        ("learning_rate: fast\n", "line 5, learning_rate: invalid float value: 'fast'"),
        ("evaluation_strategy: steps\n", "line 5, evaluation_strategy was removed from transformers 5: use --eval_st"),
        ("max_steps: 1\nmax_steps: 2\n", "max_steps stands there more than once"),
        ("pre_seq_len: 1\nnum_virtual_tokens: 2\n", "line 6, num_virtual_tokens: 2 contradicts pre_seq_len 1"),
        ("max_steps: [1, 2]\n", "line 5, max_steps: 2 is one value too many"),
        ("max_steps: [1\n", "line 6, column 1: not YAML"),
        ("lr_scheduler_kwargs: {a: !x 1}\n", "line 5, column 26: not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(config, text, message):
    with pytest.raises(UserError, match="recipe.yaml") as error:
        parse_train_arguments([config(NEEDED_YAML + text)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recipe.txt", "", "must end in .yaml, .yml, .json"),
        ("recipe.yaml", "- do_train\n", "must be lines of `name: value`"),
        ("recipe.json", "[1]", "must be an object"),
        ("recipe.json", '{"max_steps": 1,\n "a" 2}', "line 2, column 6: not JSON"),
        ("recipe.json", '{"max_steps": 1, "max_steps": 2}', "max_steps stands there more than once"),
        (
            "recipe.json",
            '{"max_stepz": 1}',
            "recipe.json, max_stepz: there is no such argument, the nearest is max_steps",
        ),
    ],
)
def test_a_broken_file_is_refused(config, name, text, message):
    with pytest.raises(UserError) as error:
        parse_train_arguments([config(text, name)])
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_named_with_the_place_and_the_nearest(config, monkeypatch):
    folder = Path(config("")).parent
    with pytest.raises(UserError, match=f"recipy.yaml: .* no such file in {folder}, the nearest is .*/recipe.yaml"):
        parse_train_arguments([str(folder / "recipy.yaml")])
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=f"but {ROOT}/configs/demo.yaml is there: give that, or start in {ROOT}"):
        parse_train_arguments(["configs/demo.yaml"])
    with pytest.raises(UserError, match="--config_file accelerate_configs/cpu.yaml: there is no such file in .* but"):
        launch(["--config_file", "accelerate_configs/cpu.yaml", "train"])


# Settings that others take the effect from


@pytest.mark.parametrize(
    ("text", "words", "given_up", "expected"),
    [
        ("max_steps: 9\n", "--num_train_epochs 3", "max_steps: 9", {"max_steps": -1, "num_train_epochs": 3}),
        ("max_steps: 9\n", "--num_train_epochs 3 --max_steps 4", "", {"max_steps": 4}),
        ("eval_strategy: steps\neval_steps: 5\n", "--do_eval false", "eval_strategy: steps", {"do_eval": False}),
        ("torch_compile_backend: eager\n", "--no_torch_compile", "", {"layer_compiler": None}),
        ("fp16: true\n", "--bf16", "fp16: true", {"bf16": True, "fp16": False}),
        ("validation_file: v.json\n", "--dataset_name a/b", "validation_file: v.json", {"do_train": True}),
    ],
)
def test_a_flag_wins_over_what_would_take_its_effect(config, caplog, text, words, given_up, expected):
    words = words.replace("--no_torch_compile", "--torch_compile false").split()
    arguments = parse_train_arguments([config(NEEDED_YAML + "use_cpu: true\n" + text), *words]).training
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert (f"line 6, {given_up} is given up for {' '.join(words[:2])}" in caplog.text) or not given_up
    assert "eval_steps" not in caplog.text  # it goes with the strategy


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("save_strategy: epoch\n", "--save_steps 5", "--save_steps 5 has no effect beside RECIPE, line 5, save_strat"),
        ("eval_strategy: no\n", "--eval_steps 5", "line 5, eval_strategy: no, only with --eval_strategy steps: ch"),
        ("do_sample: false\n", "--top_p 0.5", "line 5, do_sample: false, only with --do_sample: change"),
        (
            "lr_scheduler_type: constant\n",
            "--warmup_steps 5",
            "line 5, lr_scheduler_type: constant: change one",
        ),
        ("pre_seq_len: 4\nprefix_dropout: 0.1\n", "--peft_type lora", "RECIPE, line 5, pre_seq_len; RECIPE, line 6"),
        ("metric_for_best_model: hard_loss\n", "--load_best_model_at_end", "(RECIPE, line 5, metric_for_best_model)"),
        ("save_strategy: no\n", "--load_best_model_at_end", "(RECIPE, line 5, save_strategy)"),
    ],
)
def test_a_flag_that_the_file_takes_the_effect_from_is_refused_with_the_line(config, text, words, message):
    file, several = config(NEEDED_YAML + text), "--validation_file easy=a,b=b --do_eval --eval_strategy steps"
    with pytest.raises(UserError) as error:
        parse_train_arguments([file, *f"{words} {several if 'load_best' in words else ''}".split()])
    assert message in str(error.value).replace(file, "RECIPE")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_steps 5", "--eval_steps 5 has no effect without --eval_strategy steps."),
        ("--max_steps 9 --num_train_epochs 3", "--num_train_epochs 3 has no effect beside --max_steps."),
        ("--hub_model_id a/b", "--hub_model_id a/b has no effect without --push_to_hub."),
        ("--max_length 9", "--max_length 9 has no effect without --packing."),
        ("--optim sgd --adam_beta1 0.8", "--adam_beta1 0.8 has no effect beside --optim adafactor or adagrad or"),
        ("--run_name a", "--run_name a has no effect beside --report_to none."),
        ("--include_for_metrics inputs", "--include_for_metrics inputs has no effect here."),
        ("--test_file a.json", "--test_file has no effect without --do_predict."),
    ],
)
def test_what_has_no_effect_is_told(caplog, words, message):
    parse(*words.split())
    assert [record.getMessage() for record in caplog.records][0].startswith(message) and len(caplog.records) == 1


def test_what_a_flag_needs_or_takes_the_place_of_is_a_flag():
    kinds = (ModelArguments, DataArguments, TrainingArguments, PredictArguments, SearchArguments, InspectArguments)
    known = names_of_fields(kinds)
    stated = [
        texts for kind in kinds for fact in ("needs", "outdoes", "ends") for texts in facts_of(kind, fact).values()
    ]
    assert {re.search(r"\w+", text)[0] for texts in stated for text in texts} <= known.keys()
    assert {name for name, facts in FACTS.items() if "needs" in facts} <= known.keys()


def test_what_the_command_line_switches_off_takes_its_companions_along(caplog):
    recipe = str(ROOT / "configs" / "adgen_chatglm.yaml")
    parse_train_arguments([recipe, "--do_predict", "false"])
    assert caplog.text == ""
    with pytest.raises(UserError, match="adgen_chatglm.yaml, line 6, do_train is for training: leave it out"):
        parse_predict_arguments([recipe, "--prompt", "a"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("output_dir: 你好".encode("gbk"), "line 1, byte 13: 0xc4 is not UTF-8 (the file looks like GBK)"),
        (b"", "is empty"),
    ],
)
def test_a_configuration_file_that_cannot_be_read_is_told_with_its_cure(tmp_path, content, words):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        parse_train_arguments([str(tmp_path / "recipe.yaml")])
    with pytest.raises(UserError, match="is a folder"):
        parse_train_arguments([str(tmp_path)])


@pytest.mark.parametrize("words", ["--do_train FILE", "--max_steps 5 FILE", "--report_to none FILE"])
def test_a_configuration_file_behind_a_flag_is_refused_as_that(words):
    message = refusal(*words.replace("FILE", "my/recipe.yaml").split())
    assert message.startswith("my/recipe.yaml: a configuration file stands before the first flag, not behind --")


def test_a_file_of_the_fine_tuning_scripts_of_chatglm3_and_glm_4_is_told_its_flags(config):
    with pytest.raises(UserError, match="line 5, data_config is of .*--validation_file for val_file, .*migrating.md"):
        parse_train_arguments([config(NEEDED_YAML + "data_config: {train_file: t.json, val_file: v.json}\n")])


# Flags


@pytest.mark.parametrize("words", [["--do_eval"], ["--do_eval", "true"], ["--do_eval=true"], ["--do-eval"]])
def test_booleans_are_given_with_and_without_a_value(words):
    assert parse(*words, validation_file="dev.json").training.do_eval is True


def test_booleans_that_may_be_none_are_given_without_a_value():
    training_args = parse("--disable_tqdm", "--activation_checkpointing").training
    assert training_args.disable_tqdm is True and training_args.activation_checkpointing is True


def test_a_true_default_can_be_switched_off():
    assert parse("--no_ignore_pad_token_for_loss").data.ignore_pad_token_for_loss is False
    assert parse(ignore_pad_token_for_loss="false").data.ignore_pad_token_for_loss is False


def test_the_last_of_equal_flags_counts():
    assert parse("--max_steps", "1", "--max_steps", "2").training.max_steps == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat: there is no such argument, the nearest is learning_rate."),
        (["--xyzzy"], "--xyzzy: there is no such argument, --help lists all."),
        (["-lr", "1"], "--lr: there is no such argument"),
        (["--learn", "1"], "--learn: there is no such argument"),
        (["--max_steps", "1", "2"], "--max_steps: 2 is one value too many."),
        (["--max_steps"], "--max_steps: expected one argument"),
        (["--do_eval", "maybe"], "--do_eval: Truthy value expected: got maybe"),
        (["--dtype", "float64"], "--dtype: invalid choice: 'float64'"),
        (["--lr_scheduler_kwargs", "{a"], "--lr_scheduler_kwargs is not JSON"),
        (["--pre_seq_len", "1", "--num_virtual_tokens", "2"], "--num_virtual_tokens: 2 contradicts pre_seq_len 1"),
        (["--ptuning_checkpoint", "a", "--adapter_name_or_path", "b"], "b contradicts ptuning_checkpoint a"),
    ],
)
def test_a_mistake_in_a_flag_is_told(words, message):
    assert message in refusal(*words)


def test_a_second_word_that_is_no_flag_is_refused():
    with pytest.raises(UserError, match="stray: a flag begins with --"):
        parse_train_arguments(["configs/demo.yaml", "stray"])


def test_help_shows_every_argument_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_train_arguments(["--help"])
    text = capsys.readouterr().out
    fields = {field.name for kind in (ModelArguments, DataArguments, TrainingArguments) for field in fields_of(kind)}
    assert [name for name in fields - {*REFUSED, *RENAMED} if f"--{name}" not in text] == []
    assert "--hub_token" not in text and "--num-virtual-tokens" not in text


# Names of published scripts and of older releases

PUBLISHED = {
    "model_name_or_path": "base",
    "ptuning_checkpoint": "adapter",
    "config_name": "x",
    "tokenizer_name": "x",
    "cache_dir": "cache",
    "use_fast_tokenizer": "true",
    "model_revision": "v1",
    "use_auth_token": "true",
    "resize_position_embeddings": "true",
    "quantization_bit": "4",
    "pre_seq_len": "64",
    "prefix_projection": "true",
    "lang": "zh",
    "dataset_name": "some/data",
    "dataset_config_name": "default",
    "prompt_column": "content",
    "response_column": "summary",
    "history_column": "history",
    "train_file": "train.json",
    "validation_file": "dev.json",
    "test_file": "dev.json",
    "overwrite_cache": "true",
    "preprocessing_num_workers": "2",
    "max_source_length": "64",
    "max_target_length": "64",
    "val_max_target_length": "32",
    "pad_to_max_length": "true",
    "max_train_samples": "9",
    "max_eval_samples": "9",
    "max_predict_samples": "9",
    "num_beams": "2",
    "ignore_pad_token_for_loss": "true",
    "source_prefix": "问：",
    "forced_bos_token": "x",
}


def test_every_published_argument_is_accepted_and_those_without_effect_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        model_args, data_args, training_args = parse(**PUBLISHED)
    assert (model_args.adapter_name_or_path, model_args.num_virtual_tokens) == ("adapter", 64)
    assert (model_args.model_revision, data_args.dataset_config_name) == ("v1", "default")
    assert (data_args.source_prefix, training_args.num_beams) == ("问：", 2)
    assert GenerationSettings.from_arguments(training_args, data_args).max_new_tokens == 32
    told = {record.getMessage().split()[0].removeprefix("--") for record in caplog.records}
    without_task = {"validation_file", "max_eval_samples", "val_max_target_length", "num_beams"}
    assert told == {*IGNORED, *without_task, "test_file", "max_predict_samples"}


def test_the_token_of_use_auth_token_is_not_repeated(caplog):
    parse(use_auth_token="hf_secret")
    assert "hf auth login" in caplog.text and "hf_secret" not in caplog.text


def test_only_the_first_process_warns(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse(lang="zh")
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "token"])
def test_tokens_are_refused_without_repeating_them(name, config):
    message = refusal(**{name: "hf_secret"})
    assert f"--{name} is refused" in message and "HF_TOKEN" in message and "hf_secret" not in message
    with pytest.raises(UserError, match=f"line 5, {name} is refused"):
        parse_train_arguments([config(NEEDED_YAML + f"{name}: hf_secret\n")])


def test_a_token_is_refused_by_the_dataclass_too():
    with pytest.raises(UserError, match="HF_TOKEN"):
        TrainingArguments(output_dir="out", hub_token="hf_secret")


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"hub_token", "push_to_hub_token", "token"}))
def test_former_options_are_refused_with_the_way_out(name):
    message = refusal(**{name: "1"})
    assert message == f"--{name} {REFUSED[name]}."


def test_the_replacements_of_former_options_exist():
    known = {field.name for kind in (ModelArguments, DataArguments, TrainingArguments) for field in fields_of(kind)}
    words = re.sub("[,:;]", " ", " ".join(REFUSED.values())).split()
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= known


def test_removed_options_are_really_gone_from_transformers():
    stock = {field.name for field in fields_of(Seq2SeqTrainingArguments)}
    removed = {name for name, advice in REFUSED.items() if "was removed" in advice}
    assert removed & stock == set()


def test_activation_checkpointing_has_two_names(recwarn):
    training_args = parse(
        "--gradient_checkpointing", gradient_checkpointing_kwargs='{"use_reentrant": false}'
    ).training
    assert training_args.activation_checkpointing is training_args.gradient_checkpointing is True
    assert training_args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert [warning for warning in recwarn if "deprecated" in str(warning.message)] == []


# Values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path is not given"),
        ({"output_dir": None}, "--output_dir is not given"),
        ({"do_train": None}, "There is nothing to do: give --do_train, --do_eval or --do_predict."),
        ({"train_file": None}, "--do_train needs data: give --train_file or --dataset_name."),
        ({"do_eval": "true"}, "--do_eval needs data: give --validation_file or --dataset_name."),
        ({"eval_strategy": "steps"}, "--do_eval needs data"),
        ({"do_predict": "true"}, "--do_predict needs data: give --test_file or --dataset_name."),
        ({"quantization_bit": "5"}, "--quantization_bit must be 4 or 8, found 5."),
        ({"num_virtual_tokens": "0"}, "--num_virtual_tokens must be at least 1, found 0."),
        ({"encoder_hidden_size": "8"}, "--encoder_hidden_size is for --prefix_projection only"),
        ({"max_source_length": "0"}, "--max_source_length must be at least 1"),
        ({"max_target_length": "0"}, "--max_target_length must be at least 1"),
        ({"val_max_target_length": "0"}, "--val_max_target_length must be at least 1"),
        ({"max_train_samples": "0"}, "--max_train_samples must be at least 1"),
        ({"max_eval_samples": "-1"}, "--max_eval_samples must be at least 1"),
        ({"max_predict_samples": "0"}, "--max_predict_samples must be at least 1"),
        ({"preprocessing_num_workers": "0"}, "--preprocessing_num_workers must be at least 1"),
        ({"per_device_train_batch_size": "0"}, "--per_device_train_batch_size must be at least 1"),
        ({"per_device_eval_batch_size": "0"}, "--per_device_eval_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": "0"}, "--gradient_accumulation_steps must be at least 1"),
        ({"max_new_tokens": "0"}, "--max_new_tokens must be at least 1"),
        ({"num_beams": "0"}, "--num_beams must be at least 1"),
        ({"learning_rate": "0"}, "--learning_rate must be above 0, found 0.0."),
        ({"do_sample": "true", "top_p": "2"}, "--top_p must be above 0 and at most 1, found 2.0."),
        ({"do_sample": "true", "top_k": "-1"}, "--top_k must be 0 or more"),
        ({"do_sample": "true", "temperature": "0"}, "--temperature must be above 0"),
        ({"load_best_model_at_end": "true"}, "requires the save and eval strategy to match"),
        ({"deepspeed": "nowhere.json"}, "deepspeed"),
    ],
)
def test_values_out_of_range_and_missing_ones_are_refused(changes, message):
    assert message in refusal(**changes)


def test_the_best_model_by_a_score_needs_generation():
    changes = {"validation_file": "dev.json", "eval_strategy": "steps", "save_strategy": "steps", "save_steps": "10"}
    changes |= {"load_best_model_at_end": "true", "metric_for_best_model": "rouge-l"}
    assert "--metric_for_best_model rouge-l is a score" in refusal(**changes)
    assert parse("--predict_with_generate", **changes).training.greater_is_better is True
    assert parse(**{**changes, "metric_for_best_model": "loss"}).training.greater_is_better is False


def test_sampling_settings_without_sampling_are_dropped_with_a_warning(caplog):
    training_args = parse(top_p="0.5").training
    assert training_args.top_p is None and "--top_p 0.5 has no effect without --do_sample." in caplog.text


def test_a_way_between_processes_is_dropped_where_there_is_one(caplog):
    training_args = parse(ddp_backend="gloo").training
    assert training_args.ddp_backend is None and "--ddp_backend gloo has no effect on one process." in caplog.text


def test_a_data_set_stands_for_every_file():
    data_args = parse("--do_eval", "--do_predict", train_file=None, dataset_name="some/data").data
    assert data_args.dataset_name == "some/data"


def test_lengths_of_answers_default_to_those_of_training():
    _, data_args, training_args = parse(max_target_length="77")
    assert (
        data_args.val_max_target_length
        == GenerationSettings.from_arguments(training_args, data_args).max_new_tokens
        == 77
    )
    _, data_args, training_args = parse(val_max_target_length="5", max_new_tokens="9")
    assert GenerationSettings.from_arguments(training_args, data_args).max_new_tokens == 9


def test_defaults_are_those_of_a_prefix():
    training_args = parse().training
    assert training_args.learning_rate == 5e-3
    assert (training_args.logging_nan_inf_filter, training_args.dataloader_pin_memory) == (False, False)
    assert (training_args.report_to, training_args.label_names) == ([], ["labels"])


def test_data_arguments_have_what_the_data_code_reads():
    defaults = {**DEFAULTS, "val_max_target_length": DEFAULTS["max_target_length"]}
    assert {name: getattr(DataArguments(), name) for name in defaults} == defaults


@pytest.mark.parametrize(
    ("kind", "name", "choices"),
    [(ModelArguments, "chat_format", CHAT_FORMATS), (DataArguments, "metric_protocol", PROTOCOLS)],
)
def test_choices_are_those_of_the_module_that_reads_them(kind, name, choices):
    literal, _ = get_args(get_type_hints(kind)[name])
    assert get_args(literal) == tuple(choices)


def test_training_arguments_can_be_saved_and_copied():
    training_args = parse("--gradient_checkpointing").training
    assert pickle.loads(pickle.dumps(training_args)).to_dict() == training_args.to_dict()
    assert json.loads(training_args.to_json_string())["activation_checkpointing"] is True
    copy = replace(training_args, activation_checkpointing=False)
    assert copy.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (
            "tensorboard",
            "--report_to tensorboard needs a package that is not installed: `pip install -e '.[tensorboard]'`",
        ),
        ("wandb", "--report_to wandb needs a package that is not installed: `pip install wandb` installs it"),
        ("none tensorbord", "--report_to none is no service that is known: give some of azure_ml, comet_ml"),
    ],
)
def test_a_service_to_report_to_whose_package_is_missing_is_refused(monkeypatch, service, message):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    with pytest.raises(UserError) as error:
        parse("--report_to", *service.split())
    assert message in str(error.value)


@pytest.mark.parametrize("service", ["none", "all", "tensorboard"])
def test_a_service_to_report_to_that_is_there_is_taken(monkeypatch, service):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    assert ("tensorboard" in parse("--report_to", service).training.report_to) == (service != "none")
