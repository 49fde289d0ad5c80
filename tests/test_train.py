"""The command `accelerate launch glm_peft/train.py`, typed: its files, its words, its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from closeness import assert_close
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_options import GENERATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_starts import warm_python

import glm_peft.prediction.generation
from glm_peft import predict, train
from glm_peft.adapters import assembly
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.trained_state import tidy_weights
from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.prediction.prediction_files import OTHER_RUN_NAME, PARTIAL_NAME
from glm_peft.reporting.results import describe_device, format_bytes

PROJECT = Path(__file__).parents[1]
CPU = PROJECT / "accelerate_configs" / "cpu.yaml"
PREFIX = "prompt_encoder.default.embedding.weight"
WEIGHTS = "adapter_model.safetensors"
RESULTS = {"all_results.json", "predict_results.json", "generated_predictions.jsonl", "training_curves.png"}
ADAPTER = {"adapter_config.json", WEIGHTS, "provenance.json", "README.md"}
ROWS = [
    {"content": f"类型#{kind}*颜色#{colour}", "summary": f"这条{kind}是{colour}的" + "，很好看" * len(kind)}
    for kind in ("裤", "裙", "衬衫", "外套")
    for colour in ("白色", "黑色", "米色")
]
SIZES = ["--num_virtual_tokens", "4", "--max_source_length", "64", "--max_target_length", "32", "--use_cpu", "true"]
STEPS = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "6", "--max_new_tokens", "8"]
STEPS += ["--learning_rate", "0.3", "--logging_steps", "1", "--disable_tqdm", "true"]
# Nothing of this package but the import, the prompts and the end tokens.
STOCK_ANSWERS = """
import json, sys, torch, glm_peft
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from glm_peft.models.chat_formats import get_chat_format

def answers(model, tokenizer, chat_format, questions):
    stops = chat_format.stop_token_ids(tokenizer)
    for question in questions:
        ids = chat_format.encode_prompt(tokenizer, [{"role": "user", "content": question}]).ids
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        sequence = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=stops)[0, len(ids):]
        yield chat_format.clean_answer(tokenizer.decode(sequence, skip_special_tokens=True))

results = []
for base, folder, questions in json.load(sys.stdin):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rest = (tokenizer, get_chat_format(tokenizer, None), questions)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    results.append({"base": list(answers(bare, *rest))})
    model = PeftModel.from_pretrained(bare, folder)
    results[-1]["peft"] = list(answers(model, *rest))
    with model.disable_adapter():
        results[-1]["disabled"] = list(answers(model, *rest))
    auto = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results[-1]["auto"] = list(answers(auto, *rest))
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def words(tiny_model_dirs: dict[str, Path], data_file: Path) -> Callable[..., list[str]]:
    """The words of a training command that saves nothing on its way, and more."""

    def build(generation: str, output_dir: Path, *more: str, base: Path | None = None) -> list[str]:
        model = ["--model_name_or_path", str(base or tiny_model_dirs[generation]), "--output_dir", str(output_dir)]
        data = ["--train_file", str(data_file), "--do_train", "--save_strategy", "no"]
        if "--save_steps" in more:
            data = data[:-2]
        return [*model, *data, *SIZES, *STEPS, *more]

    return build


def run(*command: str) -> None:
    """The command in this process, which is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *command])
        train.main()


def refusal(capsys: pytest.CaptureFixture, command: list[str]) -> str:
    """What the command says where it ends with the exit code 2: one line, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*command)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    return error.removeprefix("error: ")


def type_command(command: list[str], config: Path = CPU, is_cold: bool = False) -> subprocess.CompletedProcess:
    """The command under `accelerate launch`; cold where everything is imported as for a user."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    launch = [
        sys.executable if is_cold else warm_python(),
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
    ]
    launch += [str(PROJECT / "glm_peft" / "train.py"), *command]
    return subprocess.run(launch, env=environment, text=True, encoding="utf-8", capture_output=True, timeout=300)


def prefix_of(folder: Path) -> torch.Tensor:
    return load_file(folder / WEIGHTS)["prompt_embeddings"]


def read_answers(folder: Path) -> list[str]:
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["predict"] for line in lines]


def log_history(checkpoint: Path) -> list[dict[str, float]]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


@dataclass
class Run:
    """A finished run: its base, its folder, its model, and the prefix that it began with."""

    base: Path
    folder: Path
    model: PeftModel
    first_prefix: torch.Tensor


@pytest.fixture(scope="module")
def runs(tiny_model_dirs, tmp_path_factory, words, data_file) -> dict[str, Run]:
    """Train, evaluate and predict with each generation."""
    finished = {}
    tasks = ["--do_eval", "--validation_file", str(data_file), "--do_predict", "--test_file", str(data_file)]
    for generation in GENERATIONS:
        folder, made = tmp_path_factory.mktemp("runs") / generation, SimpleNamespace()

        def remember(*args, made=made):
            made.model = create_adapter(*args)
            made.prefix = made.model.get_parameter(PREFIX).detach().clone()
            return made.model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assembly, "create_adapter", remember)
            run(*words(generation, folder, *tasks, "--max_steps", "30", "--save_steps", "30", "--learning_rate", "1"))
        finished[generation] = Run(tiny_model_dirs[generation], folder, made.model, made.prefix)
    return finished


@pytest.fixture(scope="module")
def stock_answers(runs) -> dict[str, dict[str, list[str]]]:
    """What stock PEFT answers in a fresh process, by generation."""
    questions = [row["content"] for row in ROWS]
    asked = json.dumps([[str(run.base), str(run.folder), questions] for run in runs.values()])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    command = [warm_python(), "-c", STOCK_ANSWERS]
    done = subprocess.run(command, input=asked, env=environment, text=True, capture_output=True, check=True)
    return dict(zip(runs, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_output_folder_holds_the_adapter_and_the_results_only(runs, generation):
    folder = runs[generation].folder
    assert {path.name for path in folder.iterdir()} == ADAPTER | RESULTS | {"checkpoint-30"}
    assert set(load_file(folder / WEIGHTS)) == {"prompt_embeddings"}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_loss_falls(runs, generation):
    losses = [entry["loss"] for entry in log_history(runs[generation].folder / "checkpoint-30") if "loss" in entry]
    results = json.loads((runs[generation].folder / "all_results.json").read_text())
    assert len(losses) == 30
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    assert results["eval_loss"] < 0.9 * losses[0]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_prefix_changes_and_the_base_does_not(runs, generation):
    finished = runs[generation]
    base = AutoModelForCausalLM.from_pretrained(finished.base, dtype=torch.float32)
    trained = dict(finished.model.get_base_model().named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(trained[name], parameter), name
    assert [name for name, parameter in finished.model.named_parameters() if parameter.requires_grad] == [PREFIX]
    assert (finished.model.get_parameter(PREFIX) != finished.first_prefix).all(), PREFIX
    assert torch.equal(prefix_of(finished.folder), finished.model.get_parameter(PREFIX))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_stock_peft_gives_the_same_answers_in_a_fresh_process(runs, stock_answers, generation):
    answers, expected = stock_answers[generation], read_answers(runs[generation].folder)
    assert answers["peft"] == expected
    assert answers["auto"] == expected


@pytest.mark.parametrize("generation", GENERATIONS)
def test_without_the_adapter_the_base_answers(stock_answers, generation):
    assert stock_answers[generation]["disabled"] == stock_answers[generation]["base"]
    assert stock_answers[generation]["base"] != stock_answers[generation]["peft"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_predict_gives_the_answers_and_scores_of_training(runs, generation, data_file, tmp_path, monkeypatch):
    finished = runs[generation]
    command = ["--model_name_or_path", finished.base, "--ptuning_checkpoint", finished.folder]
    command += ["--test_file", data_file, "--output_dir", tmp_path, "--max_new_tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, command), "--max_source_length", "64"])
    predict.main()
    assert read_answers(tmp_path) == read_answers(finished.folder)
    results = [json.loads((folder / "predict_results.json").read_text()) for folder in (tmp_path, finished.folder)]
    assert len({json.dumps({name: scores[name] for name in scores if "-" in name}) for scores in results}) == 1


def test_the_card_tells_the_base_and_how_to_load(runs):
    finished = runs["chatglm2"]
    _, metadata, text = (finished.folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert "base_model" not in metadata  # a folder of this machine
    assert metadata["library_name"] == "peft"
    assert "p-tuning-v2" in metadata["tags"]
    assert "| `train_file` | `rows.json` |" in text
    assert "| `max_steps` | 30 |" in text
    assert "| `lr_scheduler_type` | `linear` |" in text
    assert "runtime" not in text
    assert str(finished.base) not in text
    assert str(finished.folder) not in text


def test_the_code_of_the_card_loads_the_adapter(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(*words("chatglm3", Path("runs/adapter"), "--max_steps", "1"))
    card = (tmp_path / "runs" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "\n# P-Tuning v2 prefix: chatglm3\n" in card
    base = words("chatglm3", Path("runs/adapter"))[1]
    code = card.split("```python\n")[1].split("```")[0]
    loaded: dict[str, PeftModel] = {}
    exec(code.replace("path/to/adapter", "runs/adapter").replace("path/to/chatglm3", base), loaded)
    assert torch.equal(loaded["model"].get_parameter(PREFIX), prefix_of(tmp_path / "runs" / "adapter"))


def test_the_files_of_adapter_and_checkpoint_have_the_rights_of_others_and_no_empty_card(runs):
    folder = runs["chatglm2"].folder
    for place in (folder, folder / "checkpoint-30"):
        rights = {path.name: path.stat().st_mode for path in place.glob("*") if path.is_file()}
        assert len(list(place.glob("*.safetensors"))) == (1 if place == folder else 3)
        assert set(rights.values()) == {rights["adapter_config.json"]}, rights
    assert not (folder / "checkpoint-30" / "README.md").exists()
    assert "More Information Needed" not in (folder / "README.md").read_text(encoding="utf-8")


def test_an_earlier_card_with_content_stays(tmp_path):
    (tmp_path / "README.md").write_text("# mine")
    (tmp_path / "adapter_config.json").write_text("{}")
    tidy_weights(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"


def test_the_log_tells_what_is_trained_on_what_and_in_which_steps(runs, words, data_file, tmp_path, caplog):
    start = str(runs["glm4"].folder)
    more = ["--adapter_name_or_path", start, "--max_steps", "5", "--gradient_accumulation_steps", "2"]
    more += ["--do_eval", "--validation_file", str(data_file), "--warmup_steps", "1", "--learning_rate", "1e-3"]
    with caplog.at_level("INFO", "glm_peft"):
        run(*words("glm4", tmp_path / "out", *more))
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("The run\n")]
    assert told.split("\n  ")[2:] == [
        "precision: torch.float32, not quantized",
        "device: cpu, 1 process(es)",
        "adapter: 4 virtual tokens; 256 parameters in float32, 1.0 kB",
        f"continued from: {start}",
        *[line for line in told.split("\n  ") if line.startswith("trainable parameters: 256 of ")],
        "data: 12 train examples, 12 validation examples",
        "step: 8 examples (4 in a batch x 2 accumulated x 1 process(es))",
        "training: 5 steps, 2.5 epochs of 12 rows",
        "learning rate: 0.001, linear, 1 steps of warm-up",
        f"results: {tmp_path / 'out'}",
    ]
    assert caplog.records[-1].getMessage().endswith(f"\nresults: {tmp_path / 'out'}")


@pytest.mark.parametrize("accumulated", ["1", "2", "5"])
def test_the_steps_that_the_log_tells_are_those_of_the_trainer(words, tmp_path, caplog, accumulated):
    more = ["--num_train_epochs", "1.5", "--per_device_train_batch_size", "5", "--gradient_accumulation_steps"]
    with caplog.at_level("INFO", "glm_peft"):
        run(*words("chatglm2", tmp_path, *more, accumulated, "--save_steps", "100"))
    steps = int(re.search(r"training: (\d+) steps, 1.5 epochs of 12 rows", caplog.text)[1])
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{steps}"]


def test_a_gpu_is_told_with_its_name_and_memory(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=22 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe_device(torch.device("cuda", 1)) == "cuda:1 (NVIDIA L4, 22 GiB)"
    assert describe_device(torch.device("cpu")) == "cpu"


def test_sizes_are_told_in_the_unit_that_shows_them():
    assert [format_bytes(size) for size in (1024, 2**20 - 1, 2**20)] == ["1.0 kB", "1048.6 kB", "1.00 MiB"]


def test_an_interrupted_prediction_after_training_goes_on_with_the_same_adapter_only(
    words, data_file, tmp_path, monkeypatch, caplog
):
    steps = ["--max_steps", "2", "--save_steps", "1", "--do_predict", "--test_file", str(data_file)]
    answer, calls = glm_peft.prediction.generation._Generator._answer, []

    def interrupted(*given: object) -> object:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answer(*given)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(glm_peft.prediction.generation._Generator, "_answer", interrupted)
        with pytest.raises(SystemExit) as stop:
            run(*words("chatglm2", out, *steps))
    assert stop.value.code == 130
    assert "6 answers are in" in caplog.text and "--resume_from_checkpoint last goes on" in caplog.text
    shutil.copytree(out, tmp_path / "other")
    run(*words("chatglm2", out, *steps, "--resume_from_checkpoint", "last"))
    assert json.loads((out / "predict_results.json").read_text())["predict_resumed_samples"] == 6
    run(*words("chatglm2", tmp_path / "whole", *steps))
    assert read_answers(out) == read_answers(tmp_path / "whole")
    assert not (out / PARTIAL_NAME).exists()
    run(*words("chatglm2", tmp_path / "other", *steps, "--learning_rate", "0.2"))
    assert json.loads((tmp_path / "other" / "predict_results.json").read_text())["predict_resumed_samples"] == 0
    assert f"it is now called {OTHER_RUN_NAME}" in caplog.text
    assert (tmp_path / "other" / OTHER_RUN_NAME).exists()


def test_accelerate_launch_trains_evaluates_and_predicts(words, data_file, tmp_path):
    tasks = ["--do_eval", "--validation_file", str(data_file), "--do_predict", "--test_file", str(data_file)]
    done = type_command(words("glm4", tmp_path, *tasks, "--max_steps", "2", "--save_tokenizer"), is_cold=True)
    assert done.returncode == 0, done.stderr
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == ADAPTER | RESULTS | tokenizer_files
    for stated in ("device: cpu", "1 process", "torch.float32", "4 virtual tokens", "trainable parameters: 256 of"):
        assert stated in done.stderr, stated
    for stated in ("12 rows read from", "of them carry loss", f"results: {tmp_path}", "predict_rouge-l"):
        assert stated in done.stderr, stated


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_saved_tokenizer_is_that_of_the_base(tiny_model_dirs, words, tmp_path, generation):
    run(*words(generation, tmp_path, "--max_steps", "1", "--save_tokenizer"))
    text = "类型#裤 a\nb"
    expected = AutoTokenizer.from_pretrained(tiny_model_dirs[generation])(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == expected


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        # The loss falls, so that the highest is the first.
        ["--metric_for_best_model", "loss", "--greater_is_better", "true"],
        ["--metric_for_best_model", "rouge-l", "--predict_with_generate"],
    ],
)
def test_the_best_adapter_is_what_is_saved(words, data_file, tmp_path, choice, projection):
    steps = ["--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    evaluation = ["--do_eval", "--validation_file", str(data_file), "--load_best_model_at_end"]
    run(*words("glm4_0414", tmp_path, *steps, *evaluation, *choice, "--prefix_projection", str(projection)))
    name = f"eval_{choice[1]}"
    values = {entry["step"]: entry[name] for entry in log_history(tmp_path / "checkpoint-6") if name in entry}
    best = max(values, key=lambda step: (values[step], -step))
    assert set(values) == {2, 4, 6}
    assert choice[1] != "loss" or best == 2
    torch.testing.assert_close(prefix_of(tmp_path), prefix_of(tmp_path / f"checkpoint-{best}"), rtol=0, atol=0)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results[name] == pytest.approx(values[best])


@pytest.mark.parametrize("projection", ["false", "true"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(words, tmp_path, projection):
    steps = ["--max_steps", "6", "--save_steps", "3", "--prefix_projection", projection]
    run(*words("chatglm", tmp_path / "whole", *steps))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "last" / "checkpoint-3")
    (tmp_path / "last" / "checkpoint-5").mkdir()  # was being written when the run was stopped
    run(*words("chatglm", tmp_path / "last", *steps, "--resume_from_checkpoint", "last"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    run(*words("chatglm", tmp_path / "path", *steps, "--resume_from_checkpoint", checkpoint))
    expected = prefix_of(tmp_path / "whole")
    assert not torch.equal(prefix_of(tmp_path / "whole" / "checkpoint-3"), expected)
    assert torch.equal(prefix_of(tmp_path / "path"), expected)
    assert torch.equal(prefix_of(tmp_path / "last"), expected)
    assert len(log_history(tmp_path / "last" / "checkpoint-6")) == len(
        log_history(tmp_path / "whole" / "checkpoint-6")
    )


def test_resuming_from_the_last_checkpoint_starts_afresh_where_there_is_none(words, tmp_path, caplog):
    run(*words("chatglm2", tmp_path / "resumed", "--max_steps", "2", "--resume_from_checkpoint", "last"))
    run(*words("chatglm2", tmp_path / "fresh", "--max_steps", "2"))
    assert "no checkpoint is in" in caplog.text
    assert torch.equal(prefix_of(tmp_path / "resumed"), prefix_of(tmp_path / "fresh"))


def test_a_checkpoint_of_another_size_is_refused(words, tmp_path, capsys):
    run(*words("chatglm2", tmp_path, "--max_steps", "1", "--save_steps", "1"))
    checkpoint = str(tmp_path / "checkpoint-1")
    more = ["--resume_from_checkpoint", checkpoint, "--num_virtual_tokens", "5", "--max_steps", "2"]
    error = refusal(capsys, words("chatglm2", tmp_path, *more))
    assert f"The prefix in {checkpoint}" in error
    assert "(4, 64)" in error and "(5, 64)" in error


def test_a_run_goes_on_from_an_adapter(runs, words, tmp_path):
    start = runs["glm4"].folder
    run(*words("glm4", tmp_path, "--adapter_name_or_path", str(start), "--max_steps", "1", "--learning_rate", "1e-3"))
    difference = (prefix_of(tmp_path) - prefix_of(start)).abs()
    assert 0 < difference.max() < 2e-3


def test_accumulated_steps_are_those_of_one_large_batch(words, tmp_path):
    plain = ["--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--max_steps", "2"]
    run(*words("chatglm3", tmp_path / "large", *plain))
    accumulated = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    run(*words("chatglm3", tmp_path / "small", *plain, *accumulated))
    assert_close(prefix_of(tmp_path / "small"), prefix_of(tmp_path / "large"))


def test_two_processes_train_what_one_does(words, tmp_path):
    config = tmp_path / "two.yaml"
    facts = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    config.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_machines": 1, **facts}))
    plain = ["--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--max_steps", "2"]
    run(*words("chatglm2", tmp_path / "one", *plain))
    done = type_command(words("chatglm2", tmp_path / "two", *plain, "--per_device_train_batch_size", "2"), config)
    assert done.returncode == 0, done.stderr
    assert "2 process" in done.stderr
    assert done.stderr.count("trainable parameters:") == 1
    assert re.findall(r"Traceback|\w*Error|[Ww]arning|\[[WE]\d+|ended", done.stderr) == []
    assert_close(prefix_of(tmp_path / "two"), prefix_of(tmp_path / "one"))


@pytest.mark.parametrize("generation", ["chatglm", "glm4_0414"])
@pytest.mark.parametrize("more", [["--quantization_bit", "4"], ["--quantization_bit", "8"], ["--dtype", "bfloat16"]])
def test_the_adapter_is_in_float32_whatever_the_base(runs, words, tmp_path, generation, more, caplog):
    run(*words(generation, tmp_path, "--max_steps", "3", *more))
    prefix, of_float32 = prefix_of(tmp_path), prefix_of(runs[generation].folder)
    assert prefix.dtype == torch.float32
    assert prefix.shape == of_float32.shape
    assert prefix.isfinite().all()
    assert (f"quantized to {more[1]} bits" if "bit" in more[0] else "torch.bfloat16") in caplog.text


@pytest.mark.parametrize("generation", ["chatglm", "glm4"])
def test_label_smoothing_changes_the_loss_and_what_is_learnt(words, tmp_path, generation):
    for smoothing in ("0", "0.5"):
        more = ["--label_smoothing_factor", smoothing, "--max_steps", "1", "--save_steps", "1"]
        run(*words(generation, tmp_path / smoothing, *more))
    losses = [log_history(tmp_path / smoothing / "checkpoint-1")[0]["loss"] for smoothing in ("0", "0.5")]
    assert losses[0] != losses[1]
    assert not torch.equal(prefix_of(tmp_path / "0"), prefix_of(tmp_path / "0.5"))


def test_activation_checkpointing_changes_nothing(words, tmp_path):
    run(*words("chatglm", tmp_path / "plain", "--max_steps", "2"))
    run(*words("chatglm", tmp_path / "checkpointed", "--max_steps", "2", "--activation_checkpointing"))
    assert_close(prefix_of(tmp_path / "checkpointed"), prefix_of(tmp_path / "plain"))


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_packed_rows_train_what_a_batch_of_the_same_examples_does(words, data_file, tmp_path, generation):
    """All rows in one step either way: in one batch, or in a few long rows."""
    rows = sum(1 for _ in data_file.open(encoding="utf-8"))
    once = ["--max_steps", "1", "--num_train_epochs", "1"]
    run(*words(generation, tmp_path / "batch", *once, "--per_device_train_batch_size", str(rows)))
    packed = ["--packing", "--max_length", "400", "--per_device_train_batch_size", str(rows)]
    run(*words(generation, tmp_path / "packed", *once, *packed))
    assert_close(prefix_of(tmp_path / "packed"), prefix_of(tmp_path / "batch"))


def test_a_prefix_starts_where_it_was_told_to(words, tmp_path):
    still = ["--max_steps", "1", "--learning_rate", "1e-12"]
    run(*words("chatglm2", tmp_path / "normal", *still, "--prefix_init", "normal", "--prefix_init_std", "0.001"))
    run(*words("chatglm2", tmp_path / "text", *still, "--prefix_init", "text", "--prefix_init_text", "写一句广告"))
    assert prefix_of(tmp_path / "normal").std().item() == pytest.approx(0.001, rel=0.2)
    assert not torch.equal(prefix_of(tmp_path / "text"), prefix_of(tmp_path / "normal"))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_prefix_is_spoilt(words, tmp_path, capsys):
    more = ["--learning_rate", "1e37", "--lr_scheduler_type", "constant", "--max_steps", "99", "--save_steps", "1"]
    error = refusal(capsys, words("chatglm2", tmp_path, *more))
    step = int(re.search(r"The loss is not finite at step (\d+) \(learning rate 1e\+37", error)[1])
    last_good = Path(re.search(r"the last good checkpoint is (\S+)\.$", error)[1])
    checkpoints = {f"checkpoint-{number}" for number in range(1, step)}
    assert "most likely the learning rate is too high" in error
    assert {path.name for path in tmp_path.iterdir()} == checkpoints
    assert prefix_of(last_good).isfinite().all()
    later = [tmp_path / name for name in checkpoints if int(name[11:]) > int(last_good.name[11:])]
    assert not any(prefix_of(folder).isfinite().all() for folder in later)


def test_a_prefix_that_the_last_step_spoils_is_not_saved(words, tmp_path, capsys):
    more = ["--learning_rate", "1e38", "--max_steps", "1", "--lr_scheduler_type", "constant"]
    error = refusal(capsys, words("chatglm2", tmp_path, *more))
    assert "The prefix is not finite at step 1" in error
    assert "there is no good checkpoint yet" in error
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_stop_the_run_at_the_first_step(tiny_model_dirs, words, tmp_path, capsys):
    base = shutil.copytree(tiny_model_dirs["glm4"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["transformer.output_layer.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    error = refusal(capsys, words("", tmp_path / "out", "--max_steps", "3", base=base))
    assert "not finite at step 1" in error
    assert "there is no good checkpoint yet" in error


def test_a_mistake_under_accelerate_launch_is_one_sentence(words, tmp_path):
    done = type_command(words("glm4", tmp_path, base=tmp_path / "nothing"))
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"--model_name_or_path {tmp_path / 'nothing'} is not there, and a base model is wanted" in error
    assert "glm_peft/models/loading.py" not in done.stderr


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--adapter_name_or_path", "nothing/there"], "--adapter_name_or_path nothing/there is no folder or Hub id"),
        (
            ["--resume_from_checkpoint", "nothing"],
            "--resume_from_checkpoint nothing is no complete checkpoint (there is no such folder)",
        ),
        (
            ["--resume_from_checkpoint", "."],
            "--resume_from_checkpoint . is no complete checkpoint (it lacks checkpoint_files.json",
        ),
        (["--output_dir", "{file}"], "--output_dir {file} cannot be written to"),
        (["--hub_token", "secret"], "--hub_token is refused"),
        (["--push_to_hub"], "--push_to_hub needs a name: give --hub_model_id USER/NAME"),
        (["--attn_implementation", "flex_attention"], "flex_attention cannot carry a prefix in training"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(words, tmp_path, data_file, capsys, more, expected):
    more = [word.format(file=data_file) for word in more]
    error = refusal(capsys, words("chatglm2", tmp_path, *more))
    assert expected.format(file=data_file) in error
    assert "secret" not in error


def test_an_adapter_of_another_base_names_both(runs, words, tmp_path, capsys):
    adapter = str(runs["chatglm"].folder)
    error = refusal(capsys, words("chatglm2", tmp_path, "--adapter_name_or_path", adapter))
    assert adapter in error
    assert str(runs["chatglm2"].base) in error


def test_one_process_takes_one_of_several_gpus(words, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 2))
    training_args = parse_train_arguments(words("glm4", tmp_path)).training
    assert training_args._n_gpu == 1
    assert "accelerate launch --num_processes 2 uses all" in caplog.text
