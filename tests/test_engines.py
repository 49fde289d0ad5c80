"""Two processes under each engine that CPUs can run: what one process does, and whole adapters and checkpoints."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from closeness import ROUNDING
from launches import CONFIGS, TRAIN, end, launch, run_commands, run_launch
from peft import PeftModel
from safetensors.torch import load_file
from short_runs import run
from transformers import AutoModelForCausalLM

from glm_peft.errors import UserError
from glm_peft.training.parallel.backends import resolve_backend

WEIGHTS = "adapter_model.safetensors"
# So unlike in length that examples share rows; 13 are no whole number of steps.
ROWS = [
    {"content": f"类型#{kind}*颜色#{colour}", "summary": f"这条{kind}是{colour}的" + "，很好看" * repeats}
    for kind, repeats in (("裤", 1), ("裙", 9), ("衬衫", 1), ("外套", 2))
    for colour in ("白色", "黑色", "米色调")
]
ROWS.append({"content": "类型#帽", "summary": "帽" * 40})
PAIRS = [{"prompt": row["content"], "chosen": row["summary"][:12], "rejected": "不好看"} for row in ROWS]
KEPT = [{"content": f"类型#{word}"} for word in ("鞋", "裤", "伞", "帽")]  # two of them are trained on in every batch
PLAIN = "--num_virtual_tokens 4 --max_source_length 64 --max_target_length 64 --disable_tqdm true --logging_steps 1 "
PLAIN += "--per_device_eval_batch_size 3 --max_new_tokens 4 --learning_rate 0.3 --do_train"
STEPS = "--max_steps 6 --save_steps 3"
BEST = "--eval_strategy steps --eval_steps 3 --load_best_model_at_end --metric_for_best_model loss "
BEST += "--greater_is_better true --do_eval --predict_with_generate --do_predict"
PROJECTED = "--prefix_projection true --learning_rate 0.01 --max_grad_norm 0.01 --gradient_accumulation_steps 2"
RUNS = {
    "best": f"{STEPS} {BEST}",
    "resumed": f"{STEPS} --resume_from_checkpoint {{folder}}/best/checkpoint-3",
    "projected": f"{STEPS} {PROJECTED}",
    "projected_resumed": f"{STEPS} {PROJECTED} --resume_from_checkpoint {{folder}}/projected/checkpoint-3",
    "lora": "--max_steps 4 --peft_type lora --learning_rate 0.01",
    # Thirteen pairs: in the last step of an epoch one process has none. An evaluation has them, too.
    "dpo": "--max_steps 4 --objective dpo --do_eval --train_file {folder}/../pairs.json "
    "--validation_file {folder}/../pairs.json --keep_file {folder}/../kept.json --keep_weight 2 --keep_every 2",
    # Adam would divide gradients that are next to nothing by themselves.
    "none": "--max_steps 2 --peft_type none --optim sgd --learning_rate 0.1 --activation_checkpointing",
}
"""By name, what each command adds; the folder is that of the engine."""


@dataclass(frozen=True)
class Engine:
    """Its config file, what it wants beside, and what shows from inside that it is in use."""

    config: str
    words: tuple[str, ...]
    wrapper: str
    kind: str
    parted: tuple[str, ...] = ()  # of which parameters a process holds half


GLOO = ("--ddp_backend", "gloo")
BASE, PREFIX = "base_model.model.layers.0.self_attn.q_proj.weight", "prompt_encoder.default.embedding.weight"
ENGINES = {
    "ddp": Engine("cpu_2_processes.yaml", ("--use_cpu", "true"), "DistributedDataParallel", "MULTI_CPU"),
    "fsdp2": Engine("fsdp2.yaml", GLOO, "FSDPPeftModelForCausalLM", "FSDP", (BASE, PREFIX)),
    "zero2": Engine("deepspeed_zero2.yaml", GLOO, "DeepSpeedEngine", "DEEPSPEED"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for name, rows in (("rows.json", ROWS), ("pairs.json", PAIRS), ("kept.json", KEPT)):
        (folder / name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return folder


@pytest.fixture(scope="module")
def words(tiny_model_dirs: dict[str, Path], folder: Path) -> Callable[..., list[str]]:
    """The words of one of `RUNS` in a folder of its own, for steps of four examples."""

    def build(engine: str, name: str, batch_size: int, *more: str) -> list[str]:
        own = RUNS[name].format(folder=folder / engine).split()
        common = [word for word in PLAIN.split()]
        if name in ("lora", "none"):
            common = common[2:]  # they have no virtual tokens
        files = [f"--{kind}_file={folder / 'rows.json'}" for kind in ("train", "validation", "test")]
        base = ["--model_name_or_path", str(tiny_model_dirs["chatglm2"]), "--output_dir", str(folder / engine / name)]
        saves = [] if "--save_steps" in own else ["--save_strategy", "no"]
        return [*base, *files, *common, "--per_device_train_batch_size", str(batch_size), *saves, *own, *more]

    return build


@pytest.fixture(scope="module")
def one(folder: Path, words: Callable[..., list[str]]) -> Path:
    """The folder of the runs in one process, steps of four examples."""
    for name in RUNS:
        run(words("one", name, 4, "--use_cpu", "true"))
    return folder / "one"


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(engine: str, folder: Path, words: Callable[..., list[str]]) -> Path:
    """The folder of the runs in two processes, each with half of every step."""
    (folder / engine).mkdir()
    commands = [words(engine, name, 2, *ENGINES[engine].words) for name in RUNS]
    run_commands(folder / engine, commands, CONFIGS / ENGINES[engine].config, {"DS_ACCELERATOR": "cpu"})
    return folder / engine


def history(run_folder: Path, step: int = 6) -> list[dict[str, float]]:
    state = json.loads((run_folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [{name: entry[name] for name in entry if name.endswith(("loss", "norm"))} for entry in state["log_history"]]


def results(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "all_results.json").read_text())


def assert_close(found: Path, expected: Path, share: float = 5e-4) -> None:
    """
    No number is further off than a share of the largest: far more than by rounding alone, as Adam divides by the size
    of gradients, of which the smallest are hardly more than rounding. The losses are compared more strictly.
    """
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).abs().max() <= share * largest, name


def assert_same_losses(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for own, wanted in zip(found, expected, strict=True):
        assert own == pytest.approx(wanted, rel=ROUNDING)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_of_accelerates_and_tells_its_command(config):
    assert load_config_from_file(str(config)).num_processes >= 1
    header = " ".join(line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --quiet --config_file accelerate_configs/{config.name}" in header


def test_the_engine_that_was_asked_for_is_in_use(two, engine):
    facts, expected = json.loads((two / "best" / "facts.json").read_text()), ENGINES[engine]
    assert (facts["world_size"], facts["wrapper"], facts["engine"]) == (2, expected.wrapper, expected.kind)
    for name in (BASE, PREFIX):
        parts = 2 if name in expected.parted else 1
        assert facts["held"][name] * parts == facts["whole"][name]
    assert facts["own_groups"] == (engine == "fsdp2")  # every layer is put together by itself, never all at once


@pytest.mark.parametrize("name", ["best", "projected"])
def test_the_losses_are_those_of_one_process(two, one, name):
    assert_same_losses(history(two / name), history(one / name))


def test_pairs_of_answers_have_the_loss_and_the_rewards_of_one_process(two, one):
    own, expected = results(two / "dpo"), results(one / "dpo")
    names = [name for name in expected if "rewards/" in name or name.endswith("_loss")]
    assert len(names) == 6
    assert {name: own[name] for name in names} == pytest.approx({n: expected[n] for n in names}, rel=ROUNDING)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "none"])
def test_the_adapter_is_whole_and_that_of_one_process(two, one, name):
    assert_close(two / name / WEIGHTS, one / name / WEIGHTS)


def test_a_base_that_is_trained_is_whole_and_that_of_one_process(two, one):
    assert_close(two / "none" / "model.safetensors", one / "none" / "model.safetensors")


@pytest.mark.parametrize("name", ["best", "projected"])
def test_a_checkpoint_has_what_one_of_one_process_has(two, one, name):
    for step in (3, 6):
        for file in (WEIGHTS, "prefix_encoder.safetensors"):
            assert_close(two / name / f"checkpoint-{step}" / file, one / name / f"checkpoint-{step}" / file)


def test_stock_peft_loads_the_adapter_in_one_process(two, tiny_model_dirs):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["chatglm2"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, two / "projected")
    saved = load_file(two / "projected" / WEIGHTS)["prompt_embeddings"]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, saved)
    assert model(input_ids=torch.tensor([[1, 2, 3]]), position_ids=torch.arange(3)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name, whole", [("resumed", "best"), ("projected_resumed", "projected")])
def test_a_resumed_run_goes_on_as_the_unbroken_one(two, name, whole):
    losses = [[entry for entry in history(two / run) if "loss" in entry] for run in (name, whole)]
    assert_same_losses(*losses)
    for file in (WEIGHTS, "prefix_encoder.safetensors"):
        assert_close(two / name / "checkpoint-6" / file, two / whole / "checkpoint-6" / file, share=1e-6)


def test_the_best_is_what_is_saved_and_predicts_the_same_answers(two, one):
    state = json.loads((two / "best" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3  # the loss falls, and the highest was asked for
    assert_close(two / "best" / WEIGHTS, two / "best" / f"checkpoint-{state['best_global_step']}" / WEIGHTS, share=0)
    answers = [(folder / "best" / "generated_predictions.jsonl").read_text() for folder in (two, one)]
    assert answers[0] == answers[1]
    own, expected = results(two / "best"), results(one / "best")
    scores = [name for name in expected if name.endswith(("loss", "rouge-l", "bleu-4"))]
    assert len(scores) == 10  # two losses, and for two sets of rows both scores as published and against the file
    assert {name: own[name] for name in scores} == pytest.approx(
        {name: expected[name] for name in scores}, rel=ROUNDING
    )


def go_on_in_one_process(words: Callable[..., list[str]], two: Path, output_dir: Path) -> None:
    """As `resumed`, with four examples in a step as before."""
    more = ["--use_cpu", "true", "--output_dir", str(output_dir)]
    more += ["--resume_from_checkpoint", str(two / "best" / "checkpoint-3")]
    run([*words("one", "resumed", 4), *more])


def test_one_process_goes_on_from_a_checkpoint_of_two_or_is_refused(two, engine, words, tmp_path, capsys, caplog):
    if not engine.startswith("zero"):
        go_on_in_one_process(words, two, tmp_path / "out")
        assert "was written by 2 process(es), and this run has 1" in caplog.text
        assert_close(tmp_path / "out" / "checkpoint-6" / WEIGHTS, two / "resumed" / "checkpoint-6" / WEIGHTS)
        return
    with pytest.raises(SystemExit):
        go_on_in_one_process(words, two, tmp_path / "out")
    expected = (
        f"{two / 'best' / 'checkpoint-3'} was written by 2 process(es) under {engine}, and this run has 1 under "
    )
    assert expected + "one process, which cannot read its optimizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, more, environment",
    [
        ("cpu_2_processes.yaml", ["--use_cpu", "true"], {}),
        ("deepspeed_zero2.yaml", [*GLOO], {"DS_ACCELERATOR": "cpu"}),
    ],
)
def test_a_config_trains_in_two_processes_as_its_header_says(words, one, tmp_path, config, more, environment):
    command, file = [*words("typed", "lora", 2), *more, "--output_dir", str(tmp_path)], CONFIGS / config
    if environment:
        run_commands(tmp_path, [command], file, environment)
    else:
        assert "2 process(es)" in run_launch(tmp_path / "log", TRAIN, command, config=file, knows="torch")
    assert_close(tmp_path / WEIGHTS, one / "lora" / WEIGHTS)
    header = (CONFIGS / config).read_text().replace("\\\n#", "")
    assert " ".join(more) in " ".join(header.split())
    assert all(f"{name}={value}" in header for name, value in environment.items())


@pytest.mark.parametrize(
    "config, more, expected",
    [
        ("cpu_2_processes.yaml", [], "2 processes were started, but each would train alone"),
        ("fsdp2.yaml", ["--use_cpu", "true"], "The config file asks for FSDP, which needs GPUs"),
        ("fsdp2.yaml", [*GLOO], "The config file asks for FSDP, which needs GPUs"),
        ("deepspeed_zero2.yaml", ["--use_cpu", "true"], "The config file asks for DeepSpeed, which these settings"),
    ],
)
def test_another_engine_than_the_one_that_was_asked_for_is_refused(words, tmp_path, config, more, expected):
    command, log = [*words("typed", "lora", 2), *more, "--output_dir", str(tmp_path / "out")], tmp_path / "log"
    process = launch(log, TRAIN, command, config=CONFIGS / config, environment={"DS_ACCELERATOR": "cpu"})
    code, said = end(process, log)
    assert code != 0
    assert f"error: {expected}" in said
    assert "Loading weights" not in said
    assert list((tmp_path / "out").iterdir()) == []


def settings(**given: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The arguments of the model and of training that say which engine runs what."""
    own = {"quantization_bit": None, "peft_type": "prefix_tuning", "dtype": "auto"}
    plugin, version = given.pop("stage", None), given.pop("version", None)
    kind = DistributedType.DEEPSPEED if plugin else DistributedType.MULTI_GPU if version else DistributedType.NO
    training = {
        "distributed_state": SimpleNamespace(distributed_type=given.pop("kind", kind)),
        "deepspeed_plugin": SimpleNamespace(zero_stage=plugin) if plugin else None,
        "fsdp_plugin_args": {"fsdp_version": version} if version else None,
        "world_size": 1,
        "device": torch.device("cpu"),
        "optim": "adamw_torch",
        "do_train": True,
        "do_eval": False,
        "save_only_model": False,
        "load_best_model_at_end": False,
    }
    model = {name: given.pop(name, value) for name, value in own.items()}
    return SimpleNamespace(**model), SimpleNamespace(**training | given)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"stage": 3, "kind": DistributedType.MULTI_CPU}, "asks for DeepSpeed, which these settings would replace"),
        ({"version": 2, "kind": DistributedType.MULTI_CPU}, "asks for FSDP, which needs GPUs"),
        ({"version": 2, "kind": DistributedType.NO}, "asks for FSDP, which needs GPUs"),
        ({"version": 1}, "FSDP version 1 flattens"),
        ({"version": 2, "do_train": False, "do_eval": True}, "--do_train is not given: evaluate with"),
        ({"version": 2, "optim": "adafactor"}, "--optim adafactor cannot work on a sharded adapter"),
        ({"version": 2, "quantization_bit": 8}, "--quantization_bit 8 and FSDP do not go together"),
        ({"stage": 3}, "asks for ZeRO-3, which shards the base; here FSDP2 does that: use"),
        ({"stage": 2, "do_train": False, "do_eval": True}, "ZeRO-2 works in training alone"),
        ({"stage": 2, "save_only_model": True, "load_best_model_at_end": True}, "do not go together with DeepSpeed"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_in_one_sentence(given, expected):
    with pytest.raises(UserError) as refusal:
        resolve_backend(*settings(**given))
    sentence = str(refusal.value)
    assert expected in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("given", [{}, {"stage": 2, "quantization_bit": 4}, {"version": 2}, {"do_train": False}])
def test_what_engines_can_do_is_let_through(given):
    model_args, training_args = settings(**given)
    assert resolve_backend(model_args, training_args) == torch.device("cpu")
