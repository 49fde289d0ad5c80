"""The space of a search: what a file may say, which values go together, and what is refused in one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from glm_peft.arguments.search import as_command_line, parse_search_arguments
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.errors import UserError
from glm_peft.trials.space import Parameter, check_space, draw_settings, read_space

PROJECT = Path(__file__).parents[1]
FIXED = {"model_name_or_path": ["base"], "train_file": ["rows.json"]}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], list[Parameter]]:
    """The parameters of a file with this text."""

    def read_text(text: str) -> list[Parameter]:
        (tmp_path / "space.yaml").write_text(text, encoding="utf-8")
        return read_space(str(tmp_path / "space.yaml"))

    return read_text


def draw(space: list[Parameter], fixed: dict[str, list[str]] | None = None, **values: Any) -> dict[str, list[str]]:
    """The settings of a trial that are not the fixed ones of every test."""
    settings = draw_settings(space, FIXED | (fixed or {}), FixedTrial(values))
    return {name: words for name, words in settings.items() if name not in FIXED}


def test_values_have_the_types_of_their_arguments(read):
    text = "num_virtual_tokens: [16, 64]\nlearning_rate: [1e-3, 1]\nprefix_projection: [true, false]\n"
    text += (
        "prefix_init: [null, normal]\nlr_scheduler_type: [linear, no]\ntarget_modules: [[q_proj, v_proj], [o_proj]]"
    )
    choices = {parameter.name: parameter.distribution.choices for parameter in read(text)}
    assert choices == {
        "num_virtual_tokens": (16, 64),
        "learning_rate": (0.001, 1.0),
        "prefix_projection": (True, False),
        "prefix_init": (None, "normal"),
        "lr_scheduler_type": ("linear", "no"),
        "target_modules": ("q_proj v_proj", "o_proj"),
    }
    assert [type(value) for value in choices["learning_rate"]] == [float, float]


def test_a_range_has_the_type_of_its_argument_and_reads_numbers_that_yaml_takes_for_text(read):
    text = "learning_rate: {low: 1e-4, high: 1e-1, log: true}\nnum_virtual_tokens: {low: 8, high: 64, step: 8}"
    rate, length = (parameter.distribution for parameter in read(text))
    assert rate == FloatDistribution(1e-4, 0.1, log=True)
    assert length == IntDistribution(8, 64, step=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: {low: 1, high: 0.1}", "low <= high"),
        ("learning_rate: {low: 0, high: 1, log: true}", "low > 0"),
        ("learning_rate: {low: 1, high: 2, log: true, step: 1}", "step"),
        ("learning_rate: {low: a, high: 1}", "could not convert string to float: 'a'"),
        ("learning_rate: {low: true, high: 2}", "could not convert string to float: 'True'"),
        ("num_virtual_tokens: {low: 1.5, high: 4}", "'1.5'"),
        ("num_virtual_tokens: {low: 1, high: 4, step: 0}", "step > 0"),
        ("learning_rate: {low: 1, hihg: 2}", "unexpected keyword argument 'hihg'"),
        ("learning_rate: {low: 1}", "missing 1 required positional argument: 'high'"),
        ("num_virtual_tokens: []", "one or more elements"),
        ("learning_rate: [1]\nnum_virtual_tokens:", "num_virtual_tokens has no values"),
        ("# nothing", "there is nothing to search"),
        ("learning_rate: [1]\nlearning_rate: [2]", "learning_rate stands there more than once"),
        ("learning_rate: [1", "not YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_place(read, text, said):
    with pytest.raises(UserError, match="space.yaml") as error:
        read(text)
    assert said in str(error.value)


def test_what_has_no_effect_beside_other_values_is_not_drawn(read):
    space = read("prefix_init_text: [hello]\nprefix_init_std: [0.1]\nprefix_init: [null, normal, text]\n")
    values = {"prefix_init_text": "hello", "prefix_init_std": 0.1}
    assert draw(space, prefix_init=None, **values) == {}
    assert draw(space, prefix_init="normal", **values) == {"prefix_init": ["normal"], "prefix_init_std": ["0.1"]}
    assert draw(space, prefix_init="text", **values) == {"prefix_init": ["text"], "prefix_init_text": ["hello"]}


def test_a_prefix_from_a_text_is_not_projected_and_a_width_is_for_a_projection(read):
    space = read("encoder_hidden_size: [8]\nprefix_projection: [true, false]\nprefix_init: [null, text]")
    fixed, values = {"prefix_init_text": ["hello"]}, {"encoder_hidden_size": 8}
    projected = draw(space, fixed, prefix_init=None, prefix_projection=True, **values)
    assert projected == {"prefix_projection": ["true"], "encoder_hidden_size": ["8"]}
    assert draw(space, fixed, prefix_init=None, prefix_projection=False, **values) == {"prefix_projection": ["false"]}
    assert draw(space, fixed, prefix_init="text") == fixed | {"prefix_init": ["text"]}


def test_flags_of_another_method_are_left_out(read):
    space = read("peft_type: [prefix_tuning, lora]\nlora_rank: [2]\nnum_virtual_tokens: [4]")
    fixed, values = {"prefix_dropout": ["0.1"]}, {"lora_rank": 2, "num_virtual_tokens": 4}
    assert draw(space, fixed, peft_type="lora", **values) == {"peft_type": ["lora"], "lora_rank": ["2"]}
    assert draw(space, fixed, peft_type="prefix_tuning", **values) == fixed | {
        "peft_type": ["prefix_tuning"],
        "num_virtual_tokens": ["4"],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("peft_type: [lorra]\nnum_virtual_tokens: [4]", "peft_type: the value lorra cannot.*invalid choice: 'lorra'"),
        ("learning_rat: [1]", "learning_rat: the value 1 cannot be tried.*the nearest is learning_rate"),
        ("prefix_init: {low: 1, high: 2}", "prefix_init: the value 1 cannot be tried.*invalid choice: '1'"),
    ],
)
def test_names_and_values_are_left_to_the_parser_of_training(read, text, said):
    with pytest.raises(UserError, match=f"line 1, {said}"):
        check_space(read(text), FIXED, "loss", lambda settings: parse_train_arguments(as_command_line(settings)))


def test_null_takes_an_argument_out_and_a_list_becomes_several_words(read):
    space = read("prefix_dropout: [null]\ntarget_modules: [[q_proj, v_proj]]\npeft_type: [lora]")
    drawn = draw(space, {"prefix_dropout": ["0.1"]}, peft_type="lora", target_modules="q_proj v_proj")
    assert drawn == {"peft_type": ["lora"], "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model_name_or_path: [a, b]", "cannot be searched, as all trials have the same base, rows, seed"),
        ("max_train_samples: [10, 20]", "cannot be searched"),
        ("seed: [1, 2]", "cannot be searched"),
        ("eval_steps: [1, 2]", "cannot be searched"),
        ("output_dir: [a, b]", "cannot be searched"),
        ("label_smoothing_factor: [0.0, 0.1]", "changes the loss that trials are compared by"),
        ("max_target_length: [8, 16]", "give --val_max_target_length"),
        ("prefix_init_std: [0.1, 0.2]", "has no effect in any trial"),
        ("lora_rank: [2, 4]", "has no effect in any trial"),
    ],
)
def test_what_trials_cannot_differ_in_is_refused(read, text, said):
    with pytest.raises(UserError, match="space.yaml, line 1") as error:
        check_space(read(text), FIXED, "loss", lambda settings: None)
    assert said in str(error.value)


def test_what_changes_the_loss_may_be_searched_by_a_score(read):
    tried = []
    check_space(read("label_smoothing_factor: [0.0, 0.1]"), FIXED, "bleu-4", tried.append)
    assert [settings["label_smoothing_factor"] for settings in tried] in ([["0.0"], ["0.1"]], [["0.1"], ["0.0"]])


def test_every_value_is_tried_in_thought_and_the_one_that_training_refuses_is_named(read):
    def refuse(settings: dict[str, list[str]]) -> None:
        if settings["num_virtual_tokens"] == ["0"]:
            raise UserError("it must be at least 1.")

    space = read("prefix_init: [null, normal]\nnum_virtual_tokens: [4, 0]\nprefix_init_std: {low: 0.1, high: 0.2}")
    with pytest.raises(UserError) as error:
        check_space(space, FIXED, "loss", refuse)
    assert str(error.value).endswith(
        "line 2, num_virtual_tokens: the value 0 cannot be tried, as training would stop with: it must be at least 1."
    )


SETTINGS = ["--space", "s.yaml", "--output_dir", "o", "--train_file", "t.json", "--validation_file", "v.json"]
SETTINGS += ["--model_name_or_path", "base", "--use_cpu", "true"]


def test_settings_of_training_are_read_under_one_name_each(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("pre_seq_len: 8\nlearning_rate: 1e-2\nsave_strategy: no\nlabel_names: [labels, more]\n")
    more = ["--learning-rate", "2e-2", "--packing", "--no_ignore_pad_token_for_loss", "--n_trials=3"]
    search_args, settings = parse_search_arguments([str(config), *SETTINGS, *more])
    assert (search_args.space, search_args.n_trials, search_args.direction) == ("s.yaml", 3, "minimize")
    assert settings["num_virtual_tokens"] == ["8"] and settings["learning_rate"] == ["0.02"]
    assert settings["packing"] == ["true"] and settings["ignore_pad_token_for_loss"] == ["false"]
    assert not {"space", "n_trials", "pre_seq_len"} & settings.keys()
    words = as_command_line(settings)
    assert "--save_strategy=no" in words and words[words.index("--label_names") + 1 :][:2] == ["labels", "more"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (SETTINGS[2:], "--space is not given"),
        ([*SETTINGS, "--n_trials", "0"], "--n_trials must be at least 1, found 0"),
        ([*SETTINGS, "--n_trial", "3"], "--n_trial: there is no such argument, the nearest is n_trials"),
        ([*SETTINGS, "--metric", "bleu-4"], "give --predict_with_generate too"),
        ([*SETTINGS, "--metric", "bleu"], "invalid choice: 'bleu'"),
        ([word for word in SETTINGS if word not in ("--validation_file", "v.json")], "give --validation_file"),
    ],
)
def test_a_command_that_is_wrong_is_refused(words, said):
    with pytest.raises(UserError) as error:
        parse_search_arguments(words)
    assert said in str(error.value)


def test_the_command_of_the_example_is_understood(monkeypatch):
    monkeypatch.chdir(PROJECT)
    lines = (PROJECT / "configs" / "search_space.yaml").read_text(encoding="utf-8").splitlines()
    command = next(line for line in lines if "python -m glm_peft.search " in line and line.startswith("#   "))
    search_args, settings = parse_search_arguments(command.split()[4:])
    assert settings["output_dir"] == ["output/search"]
    names = {parameter.name for parameter in read_space(search_args.space)}
    assert names >= {"learning_rate", "num_virtual_tokens", "prefix_projection", "prefix_dropout", "prefix_init"}
