"""Several data sets for evaluation, each with a name in its scores."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from closeness import ROUNDING
from data_fakes import make_data_args
from short_runs import NEEDED, ROWS, run, training_words
from transformers import TrainerControl

from glm_peft.arguments.doctor import parse_doctor_arguments, wanted_splits
from glm_peft.arguments.splits import evaluation_sets, expand_splits, file_of, split_of, validation_files
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.errors import UserError
from glm_peft.training.curves import plot_training_curves
from glm_peft.training.watch import EarlyStopping

EVALUATED = [*NEEDED, "--do_eval", "--eval_strategy", "steps"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seven short rows and five long ones."""
    folder = tmp_path_factory.mktemp("sets")
    files = {"short": ROWS[:7], "long": ROWS[7:]}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in files}


@pytest.fixture(scope="module")
def several(tiny_model_dirs, sets, tmp_path_factory) -> Path:
    """A run that takes the best model by the loss of the long rows, where the highest is the first."""
    folder = tmp_path_factory.mktemp("several") / "run"
    words = ["--validation_file", ",".join(f"{name}={file}" for name, file in sets.items()), "--do_eval"]
    words += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--max_steps", "3"]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "long_loss", "--greater_is_better", "true"]
    run(training_words(tiny_model_dirs["chatglm3"], folder, *words, *best, "--predict_with_generate"))
    return folder


def test_each_set_has_scores_under_its_own_name(several, tiny_model_dirs, sets, tmp_path):
    results = json.loads((several / "all_results.json").read_text(encoding="utf-8"))
    assert "eval_loss" not in results
    for name, file in sets.items():
        words = ["--model_name_or_path", str(tiny_model_dirs["chatglm3"]), "--adapter_name_or_path", str(several)]
        words += ["--validation_file", str(file), "--do_eval", "--predict_with_generate", "--max_new_tokens", "4"]
        words += ["--max_source_length", "64", "--max_target_length", "32", "--per_device_eval_batch_size", "6"]
        run([*words, "--use_cpu", "true", "--output_dir", str(tmp_path / name)])
        alone = json.loads((tmp_path / name / "all_results.json").read_text(encoding="utf-8"))
        for score in ("loss", "rouge-l", "reference_length"):
            assert results[f"eval_{name}_{score}"] == pytest.approx(alone[f"eval_{score}"], rel=ROUNDING)


def test_rows_held_out_of_sources_have_scores_by_source_and_together(several, tiny_model_dirs, sets, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    mixed = ",".join(f"{name}={file}:1" for name, file in sets.items())
    results = {}
    for name, train_file in {"mixed": mixed, "one": str(tmp_path / "all.json")}.items():
        words = ["--model_name_or_path", str(tiny_model_dirs["chatglm3"]), "--adapter_name_or_path", str(several)]
        words += ["--train_file", train_file, "--validation_split", "4", "--do_eval", "--predict_with_generate"]
        words += ["--max_new_tokens", "1", "--per_device_eval_batch_size", "1", "--use_cpu", "true"]
        run([*words, "--output_dir", str(tmp_path / name)])
        results[name] = json.loads((tmp_path / name / "all_results.json").read_text(encoding="utf-8"))
    rows = {name: results["mixed"]["data"][f"validation_{name}"]["rows"] for name in sets}
    assert sum(rows.values()) == results["one"]["data"]["validation"]["rows"] == 4 and min(rows.values())
    for score in ("loss", "rouge-l", "reference_length", "empty_predictions"):
        assert results["mixed"][f"eval_{score}"] == pytest.approx(results["one"][f"eval_{score}"], rel=ROUNDING)
    of_sets = [rows[name] * results["mixed"][f"eval_{name}_loss"] for name in sets]
    assert sum(of_sets) / 4 == pytest.approx(results["one"]["eval_loss"], rel=ROUNDING)


def test_the_best_model_is_that_of_the_set_that_is_named(several):
    state = json.loads((several / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_long_loss"] for entry in state["log_history"] if "eval_long_loss" in entry}
    assert state["best_global_step"] == max(losses, key=losses.get) == 1
    kept, best = (several / place / "adapter_model.safetensors" for place in (".", "checkpoint-1"))
    assert kept.read_bytes() == best.read_bytes()


def test_early_stopping_looks_at_the_set_that_is_named_alone(monkeypatch):
    # Stock would say at every other set that early stopping is disabled.
    monkeypatch.setattr("transformers.trainer_callback.logger.warning", pytest.fail)
    stopping, control = EarlyStopping(1), TrainerControl()
    args = SimpleNamespace(metric_for_best_model="long_loss", greater_is_better=False)
    for name, stops in (("short", False), ("long", True)):
        stopping.on_evaluate(args, SimpleNamespace(best_metric=1.0), control, metrics={f"eval_{name}_loss": 2.0})
        assert control.should_training_stop is stops


def test_the_record_names_the_files_of_all_sets(several):
    data = json.loads((several / "provenance.json").read_text(encoding="utf-8"))["data"]
    assert {name: (part["file"], part["rows"]) for name, part in data.items() if name != "train"} == {
        "validation_short": ("short.json", 7),
        "validation_long": ("long.json", 5),
    }


def test_the_curves_show_every_set(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        "glm_peft.training.curves._draw_panel", lambda axes, title, curves, span: drawn.update({title: curves})
    )
    log = [{"step": 1, "loss": 3.0, "eval_short_loss": 2.0, "eval_long_loss": 4.0, "eval_long_rouge-l": 1.0}]
    plot_training_curves(log, tmp_path / "curves.png")
    losses, scores = drawn["loss (nats per token)"], drawn["ROUGE F of generated answers (0 to 100)"]
    assert set(losses) == {"training", "evaluation short", "evaluation long"} and set(scores) == {"LONG ROUGE-L"}


def test_one_file_has_no_name(tmp_path):
    odd = tmp_path / "x=1.json"
    odd.touch()
    for file in ("dev.json", str(odd), "data/a=b,c=d.json", None):
        assert validation_files(file) == {"validation": file}


def test_files_with_names_are_splits_of_their_own():
    data_args = make_data_args(validation_file="easy=a,b.json, hard_2=c.json", train_file="t.json")
    with pytest.raises(UserError, match="a file has no name"):
        validation_files(data_args.validation_file)
    data_args.validation_file = "easy=a.json, hard_2=c.json"
    splits = expand_splits(["train", "validation"], data_args)
    assert splits == ["train", "validation_easy", "validation_hard_2"]
    assert [file_of(data_args, split) for split in splits] == ["t.json", "a.json", "c.json"]
    assert [split_of(prefix) for prefix in ("eval", "eval_hard_2")] == ["validation", "validation_hard_2"]


def test_the_trainer_gets_one_set_or_all_by_name():
    assert evaluation_sets({"train": 1}) is None
    assert evaluation_sets({"train": 1, "validation": 2}) == 2
    assert evaluation_sets({"train": 1, "validation_easy": 2, "validation_hard": 3}) == {"easy": 2, "hard": 3}


def test_the_doctor_examines_every_set():
    words = ["--model_name_or_path", "base", "--validation_file", "easy=a.json,hard=b.json"]
    examined = parse_doctor_arguments(words)
    assert wanted_splits(examined.data, examined.training) == ["validation_easy", "validation_hard"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a=1.json,a=2.json"], "a is there twice"),
        (["a=1.json,b="], "a file has no name, or a name no file"),
        (["a=1.json,b=2.json", "--load_best_model_at_end"], "loss is of none of the data sets"),
        (["a=1.json,b=2.json", "--early_stopping_patience", "2"], "such as a_loss"),
        (
            ["a=1.json,b=2.json", "--load_best_model_at_end", "--metric_for_best_model", "eval_c_loss"],
            "c_loss is of none",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(more, message):
    with pytest.raises(UserError, match=message) as error:
        _, data_args, _ = parse_train_arguments([*EVALUATED, "--validation_file", *more])
        validation_files(data_args.validation_file)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("metric", ["b_loss", "eval_b_loss"])
def test_a_metric_of_one_of_the_sets_is_taken(metric):
    words = ["--validation_file", "a=1.json,b=2.json", "--load_best_model_at_end", "--metric_for_best_model", metric]
    assert parse_train_arguments([*EVALUATED, *words]).training.metric_for_best_model == metric
