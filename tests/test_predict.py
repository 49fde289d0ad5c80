"""The command `python -m glm_peft.predict`, typed: its files, its words, its exit codes, and going on after a stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from warm_starts import warm_python

import glm_peft.prediction.generation
from glm_peft import predict
from glm_peft.adapters import assembly
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import PARTIAL_NAME
from glm_peft.provenance.ownership import digest_weights
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.file_names import PREDICTIONS_NAME

PROJECT = Path(__file__).parents[1]
QUESTIONS = ("白色衬衫", "类型#裤*版型#宽松*颜色#米色", "你好", "今天天气很好，我们去公园散步吧。", "衬衫") * 2


class Workplace:
    """A base, a prefix for it, and a file of questions of which every second has an answer."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder, self.file, self.adapter = base, folder, folder / "test.json", folder / "adapter"
        rows = [{"content": question, "summary": "白色的"} for question in QUESTIONS]
        for row in rows[1::2]:
            del row["summary"]
        self.file.write_text("\n".join(json.dumps(row) for row in rows))
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        get_peft_model(model, config).save_pretrained(self.adapter)

    def words(self, *more: str, adapter: bool = True) -> list[str]:
        """The words for the base and the adapter, and more."""
        adapted = ["--adapter_name_or_path", str(self.adapter)] if adapter else []
        return ["--model_name_or_path", str(self.base), *adapted, "--max_new_tokens", "8", *more]

    def on_file(self, output_dir: Path, *more: str, adapter: bool = True) -> list[str]:
        return self.words("--test_file", str(self.file), "--output_dir", str(output_dir), *more, adapter=adapter)


@pytest.fixture(scope="module")
def workplace(tiny_model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tiny_model_dirs["glm4_0414"], tmp_path_factory.mktemp("predict"))


def type_command(words: list[str], **options: object) -> subprocess.Popen:
    """The command in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [warm_python(), "-m", "glm_peft.predict", *words]
    return subprocess.Popen(command, cwd=PROJECT, env=environment, text=True, encoding="utf-8", **options)


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """The command in this process, which is quicker."""
    monkeypatch.setattr(sys, "argv", ["predict", *words])
    predict.main()


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str]) -> str:
    """What the command says where it ends with the exit code 2: one line, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, words)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    return error.removeprefix("error: ")


def read_rows(folder: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in (folder / PREDICTIONS_NAME).read_text(encoding="utf-8").splitlines()]


def test_the_command_writes_predictions_in_order_and_results(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(monkeypatch, workplace.on_file(tmp_path / "out", "--per_device_eval_batch_size", "3"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [PREDICTIONS_NAME, "predict_results.json"]
    rows = read_rows(tmp_path / "out")
    assert [row["prompt"] for row in rows] == list(QUESTIONS)
    assert [row["labels"] for row in rows] == ["白色的", None] * 5
    assert [row["row"] for row in rows] == list(range(1, 11)) and any(row["predict"] for row in rows)
    assert [row["messages"] for row in rows] == [[{"role": "user", "content": question}] for question in QUESTIONS]
    results = json.loads((tmp_path / "out" / "predict_results.json").read_text())
    assert results["predict_samples"] == 10 and results["predict_metric_protocol"] == "chatglm3"
    assert results["predict_reference_length"] == 3 and results["predict_rouge-1"] >= 0
    seconds = results["predict_runtime"]
    assert results["predict_samples_per_second"] == pytest.approx(10 / seconds, rel=0.02)
    assert results["predict_samples_per_second"] < results["predict_tokens_per_second"] <= 81 / seconds


def test_batches_by_tokens_one_by_one_and_the_adapters_other_name_change_nothing(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(monkeypatch, workplace.on_file(tmp_path / "1", "--per_device_eval_batch_size", "1"))
    run(monkeypatch, workplace.on_file(tmp_path / "2", "--max_batch_tokens", "100"))
    other_name = ["--ptuning_checkpoint", str(workplace.adapter)]
    run(monkeypatch, workplace.on_file(tmp_path / "3", *other_name, adapter=False))
    run(monkeypatch, workplace.on_file(tmp_path / "4", adapter=False))
    first, *others, without_adapter = (read_rows(tmp_path / name) for name in "1234")
    assert others == [first, first] and without_adapter != first


def test_a_file_without_answers_gives_no_scores(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"q": "你好"}\n', encoding="utf-8")
    words = workplace.words("--test_file", str(file), "--prompt_column", "q", "--output_dir", str(tmp_path / "out"))
    run(monkeypatch, words)
    assert read_rows(tmp_path / "out")[0]["labels"] is None
    results = json.loads((tmp_path / "out" / "predict_results.json").read_text())
    assert set(results) == {
        "predict_samples",
        "predict_resumed_samples",
        "predict_runtime",
        "predict_samples_per_second",
        "predict_tokens_per_second",
        "weights_sha256",
        "data",
    }
    assert results["weights_sha256"] == digest_weights(workplace.adapter)
    assert results["data"]["test"] | {"sha256": ""} == {"file": "questions.jsonl", "sha256": "", "rows": 1}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "10 rows; at most 8 new tokens a row; greedy; as many rows a batch as fit in memory"),
        (["--num_beams", "2", "--per_device_eval_batch_size", "5"], "; 2 beams; 5 rows a batch"),
        (["--do_sample", "--top_p", "0.5"], "; drawn with top_p 0.5, top_k 50, temperature 0.95, seed 42; as many"),
    ],
)
def test_the_log_tells_the_settings_that_have_an_effect(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    more: list[str],
    told: str,
) -> None:
    with caplog.at_level("INFO", "glm_peft"):
        run(monkeypatch, workplace.on_file(tmp_path, *more))
    assert told in caplog.text
    assert "on cpu, torch.float32, not quantized; adapter " in caplog.text
    assert "GenerationSettings" not in caplog.text and "carry loss" not in caplog.text


def test_a_prompt_prints_the_answer_alone(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with type_command(
        workplace.words("--prompt", QUESTIONS[0]), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    run(monkeypatch, workplace.on_file(tmp_path))
    assert out == f"{read_rows(tmp_path)[0]['predict']}\n"
    assert f"Base {workplace.base} on " in err and f"adapter {workplace.adapter}" in err


def test_an_adapter_is_asked_as_it_was_trained_unless_something_else_is_given(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, lengths = tmp_path / "adapter", {"max_source_length": 60, "max_target_length": 9}
    shutil.copytree(workplace.adapter, adapter)

    def opened(record: dict[str, object], **given: object) -> assembly.OpenedBase:
        caplog.clear()
        (adapter / "provenance.json").write_text(json.dumps({"base": {}} | record))
        model_args = ModelArguments(str(workplace.base), adapter_name_or_path=str(adapter))
        with caplog.at_level("INFO", "glm_peft"):
            return assembly.open_base(model_args, DataArguments(**given))

    prompt = lengths | {"source_prefix": "写：", "system_text": "短", "val_max_target_length": 7}
    base = opened({"prompt": prompt})
    asked = [{"role": "system", "content": "短"}, {"role": "user", "content": "写：你好"}]
    assert predict.encode_prompt("你好", base) == base.chat_format.encode_prompt(base.tokenizer, asked).ids
    assert GenerationSettings.from_arguments(base.data_args).max_new_tokens == 7
    assert f"As {adapter} was trained: --source_prefix '写：', --system_text '短', --max_source_len" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

    found = opened({"prompt": prompt}, source_prefix="", max_source_length=1024, max_target_length=9).data_args
    assert (found.source_prefix, found.system_text, found.max_source_length) == ("", "短", 1024)
    assert found.val_max_target_length == 9  # of the length that is given, and not of the one that is not
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "--source_prefix '写：', --max_source_length 60, and --source_prefix '', --max_source_length 1024" in warning
    )
    # Adapters of earlier versions have the recipe alone; what is nothing that these flags take is left out.
    assert opened({"recipe": lengths}).data_args.max_source_length == 60
    assert opened({"prompt": {"max_source_length": "x", "source_prefix": 3}}).data_args == DataArguments()


def test_a_killed_command_goes_on_where_it_was(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawing = ("--do_sample", "--per_device_eval_batch_size", "2")
    run(monkeypatch, workplace.on_file(tmp_path / "whole", *drawing))
    slow = workplace.on_file(tmp_path / "out", *drawing)
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom glm_peft import predict\nfrom glm_peft.prediction import prediction_files\n"
        "add = prediction_files.PartialPredictions.add\n"
        "def slow_add(*words):\n    add(*words)\n    time.sleep(2)\n"
        "prediction_files.PartialPredictions.add = slow_add\npredict.main()\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen([warm_python(), str(script), *slow], env=environment, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out" / PARTIAL_NAME
    wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / PREDICTIONS_NAME).exists()
    known = partial.read_bytes().count(b"\n") - 1
    run(monkeypatch, [*slow, "--resume"])
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")
    assert not partial.exists()
    assert json.loads((tmp_path / "out" / "predict_results.json").read_text())["predict_resumed_samples"] == known


def wait_for(condition: object, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Ctrl-C while the batch after these is generated."""
    answer, calls = glm_peft.prediction.generation._Generator._answer, []

    def interrupted(*words: object) -> object:
        calls.append(words)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return answer(*words)

    monkeypatch.setattr(glm_peft.prediction.generation._Generator, "_answer", interrupted)


def test_an_interrupted_command_keeps_its_rows_and_resumes_the_same_run_only(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = workplace.on_file(tmp_path / "out", "--per_device_eval_batch_size", "4")
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, words)
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    kept = (tmp_path / "out" / PARTIAL_NAME).read_bytes()
    assert "has the answers of a stopped run: add --resume" in refusal(monkeypatch, capsys, words)
    longer = [*words, "--resume", "--max_new_tokens", "9"]
    assert "is of another run, with max_new_tokens 8 where this" in refusal(monkeypatch, capsys, longer)
    without = workplace.on_file(tmp_path / "out", "--resume", adapter=False)
    assert "is of another run, with adapter" in refusal(monkeypatch, capsys, without)
    assert (tmp_path / "out" / PARTIAL_NAME).read_bytes() == kept
    run(monkeypatch, [*words, "--resume", "--per_device_eval_batch_size", "5"])
    run(monkeypatch, workplace.on_file(tmp_path / "whole"))
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")


def test_other_rows_or_weights_under_the_same_name_are_not_resumed(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    file, adapter = tmp_path / "rows.json", tmp_path / "adapter"
    shutil.copy(workplace.file, file)
    shutil.copytree(workplace.adapter, adapter)
    words = workplace.words("--test_file", str(file), "--output_dir", str(tmp_path), adapter=False)
    words += ["--adapter_name_or_path", str(adapter)]
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(SystemExit):
            run(monkeypatch, words)
    file.write_text("\n".join(workplace.file.read_text().splitlines()[::-1]))
    assert "with digest of the prompts' ids" in refusal(monkeypatch, capsys, [*words, "--resume"])
    shutil.copy(workplace.file, file)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    assert f"with adapter '{adapter} (sha256 " in refusal(monkeypatch, capsys, [*words, "--resume"])


def test_an_early_failure_leaves_nothing_to_resume(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = workplace.on_file(tmp_path / "out", "--adapter_name_or_path", str(tmp_path / "none"), adapter=False)
    assert f"--adapter_name_or_path {tmp_path / 'none'} is no" in refusal(monkeypatch, capsys, words)
    assert not (tmp_path / "out").exists()
    run(monkeypatch, workplace.on_file(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is nothing to predict: give --test_file FILE, --dataset_name NAME, or --prompt"),
        (
            ["--prompt", "你好", "--test_file", "rows.json"],
            "--prompt is given beside rows.json",
        ),
        (["--prompt", "  "], "--prompt '  ' is empty: give a question."),
        (["--test_file", "rows.json"], "--output_dir is not given: name a folder"),
        (
            ["--prompt", "你好", "--top_p", "0.5"],
            "--top_p 0.5 has no effect without --do_sample",
        ),
        (
            ["--prompt", "你好", "--do_sample", "--top_p", "1.5"],
            "top_p is 1.5: give a probability",
        ),
        (["--prompt", "你好", "--packing"], "--packing True is for training and has no effect on prediction: leave"),
        (["--prompt", "你好", "--train_file", "a.json"], "--train_file a.json is for training and has no effect on"),
        (["--prompt", "你好", "--num_beams", "0"], "num_beams is 0: give 1 or more."),
        (["--test_file", "none.json", "--output_dir", "OUT"], "none.json: there is no such file"),
        (
            ["--prompt", "你好", "--temprature", "1"],
            "--temprature: there is no such argument",
        ),
    ],
)
def test_mistakes_in_the_arguments_end_in_one_sentence(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    words = [str(tmp_path) if word == "OUT" else word for word in words]
    assert message in refusal(monkeypatch, capsys, workplace.words(*words))


def test_an_output_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(assembly, "load_tokenizer", lambda _: pytest.fail("something was loaded"))
    message = refusal(monkeypatch, capsys, workplace.on_file(tmp_path / "file"))
    assert message.startswith(f"--output_dir {tmp_path / 'file'} cannot be written to (")


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_with_user_errors():
        _ = 1 / 0
