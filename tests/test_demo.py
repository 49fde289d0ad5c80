"""The demo: its model, its data, what its scripts measure, and that a prefix really learns the wanted manner."""

import json
import random
import subprocess
from pathlib import Path

import pytest
import torch
from chat_turns import read_lines, write_rows
from compare_demo import EXAMPLES, TABLE_HEAD, Demo, lora_rank, prompts_with_examples
from demo_manners import GARMENTS, MANNERS
from demo_report import answers_side_by_side, score_table, size_line
from make_demo_data import SPLITS, draw_products, is_held_out, product_rows, read_content, write_content, write_summary
from peft import LoraConfig, get_peft_model
from train_demo_model import TrainingOptions, TrainingText, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_starts import warm_python

import glm_peft  # noqa: F401  (registers the generations)
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.generation import generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import write_predictions
from glm_peft.reporting.file_names import PREDICT_RESULTS_NAME as RESULTS_NAME
from glm_peft.reporting.file_names import PREDICTIONS_NAME

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "glm_peft" / "assets"
MEGABYTE = 1_000_000


def read_rows(split: str) -> list[dict[str, str]]:
    lines = (ROOT / "examples" / "demo" / f"{split}.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def demo() -> Demo:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return Demo(["configs/demo.yaml"], "test")


@pytest.fixture(scope="module")
def base_answers(tokenizer) -> list[str]:
    """The base's answers to the first ten test lines."""
    model, chat_format = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32), get_chat_format(tokenizer)
    asked = [[{"role": "user", "content": row["content"]}] for row in read_rows("test")[:10]]
    ids = [chat_format.encode_prompt(tokenizer, messages).ids for messages in asked]
    settings = GenerationSettings(max_new_tokens=96, batch_size=10)
    return generate_answers(model, tokenizer, chat_format, {"input_ids": ids}, settings)


# The model


def test_the_model_is_a_small_chatglm_6b_in_the_published_layout():
    names = {path.name for path in ASSETS.iterdir()}
    assert {"config.json", "model.safetensors", "ice_text.model", "tokenizer_config.json"} == names
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 8 * MEGABYTE
    config = json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "chatglm" and config["position_encoding_2d"]
    assert type(AutoModelForCausalLM.from_pretrained(ASSETS)).__name__ == "ChatGLMForCausalLM"


def test_the_tokenizer_gives_every_line_of_the_demo_back(tokenizer):
    rows = [row for split in SPLITS for row in read_rows(split)]
    for text in (text for row in rows for text in row.values()):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_base_states_the_attributes_in_one_of_its_manners(base_answers):
    for row, answer in zip(read_rows("test"), base_answers, strict=False):
        values = [pair.split("#")[1] for pair in row["content"].split("*")][1:]
        stated = sum(value in answer for value in values)
        assert stated >= len(values) - 1, (values, answer)


def test_training_lowers_the_loss_and_meets_no_held_out_product(tokenizer, capsys):
    text = TrainingText(tokenizer, TrainingOptions(ASSETS))
    assert not any(is_held_out(next(text.products)) for _ in range(500))
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(ASSETS).config, dtype=torch.float32)
    losses = []
    for _ in range(2):
        train(model, tokenizer, TrainingOptions(ASSETS, steps=5, batch_size=4))
        losses.append(float(capsys.readouterr().out.split()[3]))
    assert losses[1] < losses[0]


# The data


def test_the_data_is_what_the_script_makes():
    rows = [row for split in SPLITS for row in read_rows(split)]
    assert rows == product_rows(sum(SPLITS.values()), seed=0)


def test_every_product_of_the_data_is_held_out():
    chooser = random.Random(1)
    drawn = draw_products(chooser, lambda product: not is_held_out(product))
    seen = {write_content(next(drawn)) for _ in range(20_000)}
    assert not seen & {row["content"] for split in SPLITS for row in read_rows(split)}


@pytest.mark.parametrize("manner", MANNERS)
def test_every_manner_states_every_attribute(manner):
    chooser = random.Random(2)
    for product in (next(draw_products(chooser, is_held_out)) for _ in range(50)):
        summary = write_summary(product, manner, chooser)
        assert read_content(write_content(product)) == product
        assert product["garment"] in GARMENTS and "{" not in summary
        assert all(value in summary for name, value in product.items() if name != "garment")


# What is measured


def test_a_short_training_brings_the_wanted_manner(demo, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "examples", demo.examples.select(range(100)))
    parse = demo.parse_arguments
    short = ("--max_steps", "30", "--output_dir", str(tmp_path))
    monkeypatch.setattr(demo, "parse_arguments", lambda seed, *flags: parse(seed, *flags, *short))
    _, base = demo.score_base(1)
    size, tuned = demo.score_prefix(1, 4)
    assert size == 4 * 2 * 4 * 128
    assert tuned["bleu-4"] > base["bleu-4"] + 20


def test_lora_of_equal_size_has_about_as_many_numbers_as_the_prefix():
    for length in (4, 16, 64):
        base = AutoModelForCausalLM.from_pretrained(ASSETS)
        config = LoraConfig(r=lora_rank(base, length), target_modules=["query_key_value", "dense"])
        size = get_peft_model(base, config).get_nb_trainable_parameters()[0]
        assert size == pytest.approx(length * 2 * 4 * 128, rel=0.26)


def test_prompts_with_examples_hold_answered_training_lines(demo):
    prompts = prompts_with_examples(demo.train_rows, demo.test_rows, seed=1)
    assert len(prompts) == SPLITS["test"] and all(len(messages) == 2 * EXAMPLES + 1 for messages in prompts)
    answered = {row["content"]: row["summary"] for row in read_rows("train")}
    for messages, row in zip(prompts, read_rows("test"), strict=True):
        assert messages[-1]["content"] == row["content"]
        assert all(answered[messages[i]["content"]] == messages[i + 1]["content"] for i in (0, 2, 4))


def test_lines_are_asked_in_every_turn_after_other_lines_with_their_answers(tmp_path):
    lines = read_rows("train")
    rows = read_lines(write_rows(tmp_path / "rows.jsonl", lines, lines, [1, 3]))
    assert [len(row["history"]) for row in rows] == [0, 2] * 100
    assert [{name: row[name] for name in lines[0]} for row in rows] == lines
    answers = {line["content"]: line["summary"] for line in lines}
    assert all(answers[question] == answer for row in rows for question, answer in row["history"])
    assert all(row["content"] not in dict(row["history"]) for row in rows)


def type_command(*words: str) -> str:
    """What the command prints; it must end well."""
    done = subprocess.run([warm_python(), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    return done.stdout


def test_the_comparison_is_a_table_of_all_methods():
    short = {"seeds": 1, "lengths": 1, "max_steps": 2, "max_predict_samples": 2, "max_target_length": 24}
    flags = [word for name, value in short.items() for word in (f"--{name}", str(value))]
    lines = type_command("scripts/compare_demo.py", "configs/demo.yaml", *flags).splitlines()
    assert "\n".join(lines[:2]) == TABLE_HEAD
    names = ["base", "base, 3 examples in the prompt", "prefix of 1", "LoRA, the size of a prefix of 1"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == [*names, "the ceiling (the lines written again)"]
    assert rows[2][1] == "1,024" and all(0 <= float(cell) <= 100 for row in rows for cell in row[2:])


def test_the_script_of_the_model_leaves_a_model_that_was_trained(tmp_path):
    made = tmp_path / "model"
    said = type_command("scripts/train_demo_model.py", *f"--output_dir {made} --steps 2 --batch_size 2".split())
    assert "step 2  loss" in said
    assert {path.name for path in made.iterdir()} == {path.name for path in ASSETS.iterdir()}
    shapes = [
        {name: value.shape for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}
        for folder in (made, ASSETS)
    ]
    assert shapes[0] == shapes[1]


# The report


def test_the_report_puts_both_predictions_side_by_side(tmp_path):
    scores = {"rouge-1": 1.0, "rouge-2": 2.0, "rouge-l": 3.0}
    for name, answer, bleu in (("before", "甲\n乙", 10.0), ("after", "丙", 45.5)):
        (tmp_path / name).mkdir()
        write_predictions(tmp_path / name / PREDICTIONS_NAME, ["问一", "问二"], ["答一", "答二"], [answer, answer])
        results = {f"predict_{score}": value for score, value in (scores | {"bleu-4": bleu}).items()}
        (tmp_path / name / RESULTS_NAME).write_text(json.dumps(results | {"predict_samples": 2}))
    table = score_table(tmp_path / "before", tmp_path / "after")
    assert "10.00" in table and "45.50" in table and "+35.50" in table
    blocks = answers_side_by_side(tmp_path / "before", tmp_path / "after", count=1)
    assert blocks == "问一\n  base    甲 / 乙\n  prefix  丙\n  wanted  答一"


def test_the_report_tells_the_sizes_of_the_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 200_000)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"0" * 5_000)
    assert size_line(tmp_path, tmp_path) == "The adapter has 5 kB, its base 200 kB: 2.5 %."
