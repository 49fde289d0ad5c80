"""Every method of `--peft_type` on every generation: trained, saved, predicted with, gone on with, merged."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import ROUNDING, assert_close
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from short_runs import ROWS, log_of, run, training_words
from tiny_options import GENERATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_starts import warm_python

from glm_peft import convert, predict, train
from glm_peft.adapters import assembly
from glm_peft.adapters.loading import create_adapter, load_adapter
from glm_peft.adapters.other_methods import TARGETS, attach_loss
from glm_peft.adapters.saved_adapter import read_saved_adapter
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.methods import FULL, IN_EMBEDDINGS, METHODS
from glm_peft.arguments.model import ModelArguments, flags_of
from glm_peft.arguments.training import TrainArguments, TrainingArguments
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.preprocessing import batching
from glm_peft.preprocessing.collators import TrainingCollator

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "provenance.json", "README.md"}
RESULTS = {"all_results.json", "generated_predictions.jsonl", "predict_results.json", "training_curves.png"}
RATES = {"prefix_tuning": 0.3, "prompt_tuning": 0.3, "p_tuning": 0.01, "ia3": 0.1}
INSIDE = ("lora", "ia3")
ARCHITECTURES = ("chatglm", "glm4", "glm4_0414")  # one generation of each; ChatGLM2 and 3 are of GLM-4's
PAIRS = [
    (method, generation)
    for method in METHODS
    for generation in (GENERATIONS if method in ("lora", FULL) else ARCHITECTURES)
    if not (method in IN_EMBEDDINGS and generation == "chatglm")
]
OF_ADAPTERS = [pair for pair in PAIRS if pair[0] != FULL]


def words(base: Path, output_dir: Path, method: str, *more: str) -> list[str]:
    """A training command with this method, at a rate that shows after a few steps."""
    found = training_words(base, output_dir, "--peft_type", method, *more)
    replaced = {"--learning_rate": str(RATES.get(method, 0.01))}
    kept = ("--num_virtual_tokens",) if "num_virtual_tokens" not in flags_of(method) else ()
    for flag in (*replaced, *kept):
        place = found.index(flag)
        found[place : place + 2] = [flag, replaced[flag]] if flag in replaced else []
    return found


@pytest.fixture(scope="session")
def trained(tiny_model_dirs, tmp_path_factory) -> Callable[[str, str], Path]:
    """The output folder of a run of twelve steps with checkpoints at 6 and 12, made once."""
    done: dict[tuple[str, str], Path] = {}

    def train_once(method: str, generation: str) -> Path:
        if (method, generation) not in done:
            folder = tmp_path_factory.mktemp("methods") / "out"
            more = ["--max_steps", "12", "--save_steps", "6", "--do_predict", "--test_file", str(rows_of(folder))]
            run(words(tiny_model_dirs[generation], folder, method, *more))
            done[method, generation] = folder
        return done[method, generation]

    return train_once


def rows_of(folder: Path) -> Path:
    return folder.parent / "rows.json"


def answers_in(folder: Path) -> list[str]:
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["predict"] for line in lines]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stock_answers(model: Any, folder: Path) -> list[str]:
    """What transformers and PEFT generate by themselves, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat_format, answers = get_chat_format(tokenizer, None), []
    for row in ROWS:
        ids = chat_format.encode_prompt(tokenizer, [{"role": "user", "content": row["content"]}]).ids
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        stops = chat_format.stop_token_ids(tokenizer)
        sequence = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=stops)[0, len(ids) :]
        answers.append(chat_format.clean_answer(tokenizer.decode(sequence, skip_special_tokens=True)))
    return answers


def batch_of(base: Path, rows: slice = slice(0, 4)) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    features, chat_format = [], get_chat_format(tokenizer, None)
    for row in ROWS[rows]:
        prompt = chat_format.encode_prompt(tokenizer, [{"role": "user", "content": row["content"]}]).ids
        answer = chat_format.encode_answer(tokenizer, row["summary"]).ids
        features.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return TrainingCollator(tokenizer)(features)


@torch.no_grad()
def logits_of(model: Any, base: Path) -> torch.Tensor:
    """Of one row: PEFT does not count positions in padded ones, where virtual tokens stand before embeddings."""
    batch = batch_of(base, slice(0, 1))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.eval()(**inputs).logits[:, -inputs["input_ids"].shape[1] :]


# Training and what it leaves


@pytest.mark.parametrize(("method", "generation"), PAIRS)
def test_the_loss_falls(method, generation, trained):
    losses = [entry["loss"] for entry in log_of(trained(method, generation) / "checkpoint-12") if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("method", "generation"), OF_ADAPTERS)
def test_only_the_adapter_is_saved(method, generation, trained):
    folder = trained(method, generation)
    assert {path.name for path in folder.iterdir()} == ADAPTER | RESULTS | {"checkpoint-6", "checkpoint-12"}
    names = load_file(folder / "adapter_model.safetensors").keys()
    marks = {"lora": "lora_", "ia3": "ia3_"}
    assert names and all(marks.get(method, "prompt_embeddings") in name for name in names)


@pytest.mark.parametrize(("method", "generation"), OF_ADAPTERS)
def test_stock_peft_answers_as_the_run_and_the_command_do(method, generation, trained, tiny_model_dirs, tmp_path):
    folder, base = trained(method, generation), tiny_model_dirs[generation]
    # ChatGLM-6B's tiny base answers with special tokens alone: logits show that the adapter matters there too.
    logits = [logits_of(load(base), base), logits_of(PeftModel.from_pretrained(load(base), folder), base)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert_close(logits_of(load_adapter(load(base), str(folder)), base), logits[1])
    found = stock_answers(PeftModel.from_pretrained(load(base), folder), base)
    assert found == answers_in(folder)
    typed_prediction(base, tmp_path, rows_of(folder), "--adapter_name_or_path", str(folder))
    assert answers_in(tmp_path) == found


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_model_that_was_trained_as_a_whole_is_a_base_of_its_own(generation, trained, tiny_model_dirs, tmp_path):
    folder = trained(FULL, generation)
    assert stock_answers(load(folder), folder) == answers_in(folder)
    typed_prediction(folder, tmp_path, rows_of(folder))
    assert answers_in(tmp_path) == answers_in(folder)
    own, before = load(folder).state_dict(), load(tiny_model_dirs[generation]).state_dict()
    assert own.keys() == before.keys()
    assert [name for name in own if torch.equal(own[name], before[name])] == []


def typed_prediction(base: Path, output_dir: Path, rows: Path, *more: str) -> None:
    command = ["predict.py", "--model_name_or_path", str(base), "--output_dir", str(output_dir), *more]
    command += ["--test_file", str(rows), "--max_source_length", "64", "--max_new_tokens", "4", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        predict.main()


def test_the_adapter_inside_is_no_part_of_the_base_that_is_recorded(trained, tiny_model_dirs, caplog):
    folder = trained("lora", "glm4")
    sample = json.loads((folder / "provenance.json").read_text())["base"]["weights_sample"]
    assert sample and not any("base_layer" in name or "lora" in name for name in sample)
    with caplog.at_level(logging.WARNING):
        load_adapter(load(tiny_model_dirs["glm4"]), str(folder))
    assert "other weights" not in caplog.text
    with pytest.raises(UserError, match="has other weights"):
        load_adapter(changed(load(tiny_model_dirs["glm4"])), str(folder))


@torch.no_grad()
def changed(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.mul_(1.1)
    return model


def test_the_card_says_which_method_it_was(trained):
    assert "A LoRA adapter for" in (trained("lora", "glm4") / "README.md").read_text()
    assert "An (IA)³ adapter for" in (trained("ia3", "glm4") / "README.md").read_text()
    prompt_tuning = (trained("prompt_tuning", "glm4") / "README.md").read_text()
    assert "A prompt tuning adapter of 4 virtual tokens" in prompt_tuning
    full = (trained(FULL, "glm4") / "README.md").read_text()
    assert "all of it trained" in full and "PeftModel" not in full and "--adapter_name_or_path" not in full


# The loss


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("method", ["lora", "ia3", FULL])
def test_the_loss_of_a_fresh_adapter_is_the_loss_of_the_base(method, generation, tiny_model_dirs):
    base = tiny_model_dirs[generation]
    batch = batch_of(base)
    expected = load(base)(**batch).loss
    model = fresh(base, method)
    assert_close(model.eval()(**batch).loss, expected)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3", "glm4_0414"])
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning", "p_tuning"])
def test_loss_and_gradient_in_chunks_are_those_of_stock(method, generation, tiny_model_dirs):
    if method in IN_EMBEDDINGS and generation == "chatglm":
        generation = "chatglm2"
    base, found = tiny_model_dirs[generation], []
    for attached in (True, False):
        torch.manual_seed(0)
        model = fresh(base, method, attached)
        model.train()
        loss = model(**batch_of(base)).loss
        loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
        found[-1]["loss"] = loss.detach()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 1
    assert_close(found[0], found[1])


@pytest.mark.parametrize("generation", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_padding_on_the_left_changes_no_loss(method, generation, tiny_model_dirs):
    if method in IN_EMBEDDINGS and generation == "chatglm":
        generation = "glm4"
    base = tiny_model_dirs[generation]
    torch.manual_seed(0)
    model = fresh(base, method).eval()
    padded, alone = batch_of(base), [batch_of(base, slice(row, row + 1)) for row in range(4)]
    assert bool((padded["attention_mask"] == 0).any())
    count = (padded["labels"] != -100).sum()
    parts = torch.stack([model(**batch, num_items_in_batch=count).loss for batch in alone])
    assert_close(model(**padded, num_items_in_batch=count).loss, parts.sum())


def fresh(base: Path, method: str, attached: bool = True) -> Any:
    length = {"num_virtual_tokens": 4} if "num_virtual_tokens" in flags_of(method) else {}
    arguments = ModelArguments(str(base), peft_type=method, **length)
    model = create_adapter(load(base).requires_grad_(False), arguments)
    if attached:
        attach_loss(model)
    return model


@pytest.mark.parametrize("method", ["lora", FULL])
def test_packed_batches_have_the_loss_of_padded_ones(method, tiny_model_dirs, tmp_path, caplog, monkeypatch):
    losses = {}
    monkeypatch.setattr(batching, "head_cost", lambda *_: 0.0)  # most of so small a network's work is the head
    for packing in ("padded", "packed"):
        more = ["--max_steps", "1", "--logging_steps", "1", *(["--packing", "false"] if packing == "padded" else [])]
        with caplog.at_level(logging.INFO):
            run(words(tiny_model_dirs["chatglm"], tmp_path / packing, method, *more))
        losses[packing] = json.loads((tmp_path / packing / "all_results.json").read_text())["train_loss"]
    assert "Batches are packed" in caplog.text
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)


@pytest.mark.parametrize("generation", ["chatglm", "glm4_0414"])
@pytest.mark.parametrize("method", ["lora", FULL])
def test_activation_checkpointing_changes_no_number(method, generation, tiny_model_dirs, tmp_path):
    weights = []
    for name, more in {"plain": [], "checkpointing": ["--activation_checkpointing"]}.items():
        run(words(tiny_model_dirs[generation], tmp_path / name, method, "--max_steps", "3", *more))
        weights.append(load_file(next((tmp_path / name).glob("*model.safetensors"))))
    assert_close(weights[0], weights[1])


@pytest.mark.parametrize("bits", ["4", "8"])
def test_lora_learns_on_a_quantized_base(bits, tiny_model_dirs, tmp_path):
    more = ["--quantization_bit", bits, "--max_steps", "6", "--do_eval"]
    run(words(tiny_model_dirs["glm4"], tmp_path / "out", "lora", *more, "--save_steps", "6"))
    losses = [entry["loss"] for entry in log_of(tmp_path / "out" / "checkpoint-6") if "loss" in entry]
    assert losses[-1] < losses[0]


# Going on


@pytest.mark.parametrize("generation", ["chatglm", "glm4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(method, generation, trained, tiny_model_dirs, tmp_path):
    if method in IN_EMBEDDINGS and generation == "chatglm":
        generation = "glm4_0414"
    whole = trained(method, generation)
    resume(whole, tiny_model_dirs[generation], tmp_path, method)
    name = "model.safetensors" if method == FULL else "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
    states = [torch.load(folder / "checkpoint-12/optimizer.pt")["state"] for folder in (whole, tmp_path / "out")]
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    assert log_of(tmp_path / "out" / "checkpoint-12") == log_of(whole / "checkpoint-12")


def resume(whole: Path, base: Path, folder: Path, method: str) -> None:
    (folder / "out").mkdir()
    shutil.copytree(whole / "checkpoint-6", folder / "out" / "checkpoint-6")
    more = ["--max_steps", "12", "--save_steps", "6", "--resume_from_checkpoint", "last"]
    run(words(base, folder / "out", method, *more))


def test_a_checkpoint_of_another_method_is_refused(trained, tiny_model_dirs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        resume(trained("lora", "glm4"), tiny_model_dirs["glm4"], tmp_path, "prefix_tuning")
    assert "was written by a run with another --peft_type" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning"])
def test_training_goes_on_from_an_adapter(method, trained, tiny_model_dirs, tmp_path):
    start = trained(method, "glm4")
    more = ["--adapter_name_or_path", str(start), "--max_steps", "1", "--learning_rate", "1e-30"]
    command = words(tiny_model_dirs["glm4"], tmp_path / "out", method, *more)
    place = command.index("--peft_type")
    run(command[:place] + command[place + 2 :])
    files = [load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "out")]
    torch.testing.assert_close(files[0], files[1], atol=0, rtol=0)


def test_training_does_not_go_on_from_what_is_not_saved_whole(trained, tiny_model_dirs, tmp_path, capsys):
    command = words(tiny_model_dirs["glm4"], tmp_path / "out", "p_tuning")
    with pytest.raises(SystemExit):
        run([*command, "--adapter_name_or_path", str(trained("p_tuning", "glm4"))])
    assert "is of the method p_tuning, from which training cannot go on" in capsys.readouterr().err


def test_an_adapter_of_a_method_that_is_not_here_is_refused(tmp_path):
    AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=1).save_pretrained(tmp_path)
    save_file({"any": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is of the method adalora, which glm_peft does not have: load it with PEFT"):
        read_saved_adapter(str(tmp_path))


def test_an_adapter_of_another_method_is_refused(trained, tiny_model_dirs, tmp_path, capsys):
    command = words(tiny_model_dirs["glm4"], tmp_path / "out", "ia3")
    with pytest.raises(SystemExit):
        run([*command, "--adapter_name_or_path", str(trained("lora", "glm4"))])
    assert "--peft_type ia3 contradicts --adapter_name_or_path" in capsys.readouterr().err


# Merging


@pytest.mark.parametrize(("method", "generation"), [pair for pair in PAIRS if pair[0] in INSIDE])
def test_a_merged_model_answers_as_base_and_adapter(method, generation, trained, tiny_model_dirs, tmp_path):
    adapter, base = trained(method, generation), tiny_model_dirs[generation]
    convert.main(["merge", str(adapter), "--base", str(base), "--output_dir", str(tmp_path / "merged")])
    expected = logits_of(PeftModel.from_pretrained(load(base), adapter), base)
    assert_close(logits_of(load(tmp_path / "merged"), base), expected)
    assert not torch.allclose(logits_of(load(base), base), expected, atol=1e-3)
    typed_prediction(tmp_path / "merged", tmp_path / "answers", rows_of(adapter))
    assert answers_in(tmp_path / "answers") == answers_in(adapter)
    assert not any("adapter" in path.name for path in (tmp_path / "merged").iterdir())


LOADED_BY_STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert "glm_peft" not in sys.modules and not info["missing_keys"] and not info["unexpected_keys"]
print(float(model(input_ids=torch.arange(4, 20)[None]).logits.double().sum()))
"""


@pytest.mark.parametrize("generation", ["chatglm3", "glm4", "glm4_0414"])
def test_stock_transformers_loads_a_merged_model(generation, trained, tiny_model_dirs, tmp_path):
    words = ["merge", str(trained("lora", generation)), "--base", str(tiny_model_dirs[generation])]
    convert.main([*words, "--output_dir", str(tmp_path)])
    command = [warm_python("libraries"), "-c", LOADED_BY_STOCK, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    expected = load(tmp_path)(input_ids=torch.arange(4, 20)[None]).logits.double().detach()
    assert float(found.stdout) == pytest.approx(float(expected.sum()), abs=ROUNDING * float(expected.abs().sum()))


@pytest.mark.parametrize("target", ["lm_head", "word_embeddings"])
def test_merged_into_a_tied_head_or_its_embeddings_each_has_its_own_weights(target, tiny_model_dirs, tmp_path, caplog):
    base = tiny_model_dirs["chatglm"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=[target], init_lora_weights=False, lora_alpha=64)
    adapted = get_peft_model(load(base), config)
    adapted.save_pretrained(tmp_path / "lora")
    words = ["merge", str(tmp_path / "lora"), "--base", str(base), "--output_dir", str(tmp_path / "merged")]
    convert.main(words)
    merged = load(tmp_path / "merged")
    assert_close(logits_of(merged, base), logits_of(adapted, base))
    assert not torch.equal(merged.lm_head.weight, merged.transformer.word_embeddings.weight)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert "is read after `import glm_peft`, and not by stock transformers alone" in caplog.text


def test_virtual_tokens_cannot_be_merged(trained, tiny_model_dirs, tmp_path, capsys):
    adapter = str(trained("prefix_tuning", "glm4"))
    with pytest.raises(SystemExit):
        convert.main(["merge", adapter, "--base", str(tiny_model_dirs["glm4"]), "--output_dir", str(tmp_path / "out")])
    assert "is a prefix_tuning adapter, which has no place in the weights of a base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Flags


@pytest.mark.parametrize(
    ("peft_type", "given", "expected"),
    [
        ("lora", {"num_virtual_tokens": 4}, "--num_virtual_tokens is for --peft_type prefix_tuning or p_tuning or"),
        ("lora", {"prefix_projection": True}, "--prefix_projection is for --peft_type prefix_tuning, and this is l"),
        ("ia3", {"prefix_init": "normal"}, "--prefix_init is for --peft_type prefix_tuning, and this is ia3"),
        ("none", {"prefix_dropout": 0.1}, "--prefix_dropout is for --peft_type prefix_tuning, and this is none"),
        ("p_tuning", {"prefix_projection": True}, "--prefix_projection is for --peft_type prefix_tuning"),
        ("prefix_tuning", {"lora_rank": 4}, "--lora_rank is for --peft_type lora, and this is prefix_tuning"),
        (None, {"lora_alpha": 4}, "--lora_alpha is for --peft_type lora, and this is prefix_tuning"),
        ("ia3", {"lora_dropout": 0.1}, "--lora_dropout is for --peft_type lora, and this is ia3"),
        ("p_tuning", {"target_modules": ["q_proj"]}, "--target_modules is for --peft_type lora or ia3, and"),
        ("prompt_tuning", {"encoder_hidden_size": 8}, "--encoder_hidden_size is for --peft_type prefix_tuning or p_t"),
        ("none", {"quantization_bit": 4}, "--peft_type none trains the base itself, which --quantization_bit"),
        ("none", {"adapter_name_or_path": "out"}, "--peft_type none makes no adapter"),
        ("lora", {"lora_rank": 0}, "--lora_rank must be at least 1, found 0"),
        ("lora", {"lora_dropout": 1.0}, "--lora_dropout must be at least 0 and below 1, found 1.0"),
    ],
)
def test_flags_of_another_method_are_refused(peft_type, given, expected):
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        ModelArguments("base", peft_type=peft_type, **given)


@pytest.mark.parametrize("method", IN_EMBEDDINGS)
def test_what_chatglm_6b_cannot_do_is_refused_before_anything_is_loaded(
    method, tiny_model_dirs, tmp_path, monkeypatch, capsys
):
    for room, name in ((train, "load_splits"), (assembly, "load_base_model")):
        monkeypatch.setattr(room, name, lambda *args: pytest.fail("It was loaded."))
    with pytest.raises(SystemExit):
        run(words(tiny_model_dirs["chatglm"], tmp_path / "out", method))
    assert f"--peft_type {method} cannot tune ChatGLM-6B, which reads the positions" in capsys.readouterr().err


def settled(method: str, packing: bool | None = None, **training: Any) -> tuple[DataArguments, TrainingArguments]:
    training_args = TrainingArguments(output_dir="out", use_cpu=True, **training)
    model_args, data_args = ModelArguments("base", peft_type=method), DataArguments(packing=packing)
    resolved = TrainArguments(model_args, data_args, training_args).resolve(model_args, data_args)
    return resolved.data, resolved.training


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_learning_rate_and_a_typed_one_stays(method):
    assert settled(method)[1].learning_rate == METHODS[method].learning_rate
    assert settled(method, learning_rate=5e-3)[1].learning_rate == 5e-3


@pytest.mark.parametrize("method", IN_EMBEDDINGS)
def test_rows_with_virtual_tokens_in_front_are_not_packed(method):
    assert settled(method)[0].packing is False
    with pytest.raises(UserError, match="--packing puts several examples into a row"):
        settled(method, packing=True)


def test_a_trained_head_has_no_label_smoothing():
    with pytest.raises(UserError, match="--label_smoothing_factor needs a frozen head"):
        settled(FULL, label_smoothing_factor=0.1)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lora_goes_on_every_linear_layer_but_the_head(generation, tiny_model_dirs):
    model = fresh(tiny_model_dirs[generation], "lora")
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if ".lora_A." in name}
    base = load(tiny_model_dirs[generation])
    expected = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removeprefix("base_model.model.") for name in adapted} == expected - {"lm_head"}
    assert set(TARGETS[base.config.model_type]) == {name.rpartition(".")[2] for name in expected - {"lm_head"}}


def test_rank_scale_and_targets_are_those_that_were_typed(tiny_model_dirs):
    arguments = ModelArguments(str(tiny_model_dirs["glm4"]), peft_type="lora", lora_rank=2, target_modules=["q_proj"])
    config = create_adapter(load(tiny_model_dirs["glm4"]), arguments).active_peft_config
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 4, {"q_proj"})


def test_a_target_that_the_base_lacks_is_named(tiny_model_dirs):
    arguments = ModelArguments("base", peft_type="lora", target_modules=["q_proj", "query_key_value"])
    with pytest.raises(UserError, match="--target_modules query_key_value is no linear layer of .*q_proj, k_proj"):
        create_adapter(load(tiny_model_dirs["glm4"]), arguments)


def test_half_precision_is_no_place_for_the_small_steps_of_a_whole_model():
    assert ModelArguments("base", peft_type=FULL).dtype == "float32"
    assert ModelArguments("base", peft_type=FULL, dtype="bfloat16").dtype == "bfloat16"
    assert ModelArguments("base", peft_type="lora").dtype == "auto"
