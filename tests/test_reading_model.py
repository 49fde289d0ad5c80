"""The sheets that the reading model reads, and how it is trained."""

import random
from pathlib import Path

import pytest
import torch
from reading_batches import IGNORED, ReadingText
from reading_sheets import draw_sheet, is_held_out, main
from torch.nn.functional import cross_entropy
from train_reading_model import (
    TrainingOptions,
    compute_loss,
    look_back,
    make_fresh_model,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import glm_peft  # noqa: F401  (registers the generations)

EXAMPLE = Path(__file__).parents[1] / "examples" / "reading"
LONG = 55  # facts, some 500 tokens


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> TrainingOptions:
    folder = tmp_path_factory.mktemp("model")
    options = TrainingOptions(folder, hidden_size=32, num_layers=1, steps=1, tokens=300, short_facts=6, most_facts=6)
    make_fresh_model(options)
    return options


@pytest.fixture
def model(options):
    return AutoModelForCausalLM.from_pretrained(options.output_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def text(options) -> ReadingText:
    tokenizer = AutoTokenizer.from_pretrained(options.output_dir)
    return ReadingText(tokenizer, options.tokens, options.most_facts, options.seed)


# The sheets


def test_a_sheet_is_that_of_its_seed_with_names_that_no_training_has_seen():
    sheet = draw_sheet(random.Random(5), LONG, held_out=True)
    assert sheet == draw_sheet(random.Random(5), LONG, held_out=True) != draw_sheet(random.Random(6), LONG, True)
    assert len(sheet.facts) == LONG and all(
        fact.sentence in sheet.text and fact.answer in fact.sentence for fact in sheet.facts
    )
    assert all(is_held_out(fact.name) for fact in sheet.facts)
    assert not any(is_held_out(fact.name) for fact in draw_sheet(random.Random(5), LONG).facts)


@pytest.mark.parametrize("num_facts", (1, 19, 20, 39, 40, 57, 76))
def test_a_sheet_of_one_fact_a_name_has_names_enough(num_facts):
    for seed in range(60):
        sheet = draw_sheet(random.Random(seed), num_facts, whole=False, alike=True)
        assert len({fact.name for fact in sheet.facts}) == num_facts


def test_the_example_is_made_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reading_sheets.py", "--output_dir", str(tmp_path)])
    main()
    for name in ("sheet.md", "questions.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()


# Its training


def test_the_heads_of_the_first_layer_look_back_one_after_another(options, model):
    look_back(model)
    model.set_attn_implementation("eager")
    model.model.embed_tokens.weight.data.zero_()  # what stands there does not count
    attention = model(torch.arange(20)[None], output_attentions=True).attentions[0][0]
    for back, head in enumerate(attention, 1):
        assert head[-1].argmax() == 19 - back


def test_reading_a_sheet_once_for_all_rows_gives_the_loss_of_each_row_by_itself(model, text):
    batch = text.draw_batch(4)
    repeats = len(batch.rows) // len(batch.starts)
    logits, labels = [], []
    for row, row_labels in enumerate(batch.labels):
        start = batch.starts[row // repeats][batch.start_mask[row // repeats] == 1]
        out = model(input_ids=torch.cat([start, batch.rows[row]])[None]).logits[0, len(start) :]
        logits.append(out[:-1][row_labels[1:] != IGNORED])
        labels.append(row_labels[1:][row_labels[1:] != IGNORED])
    of_answers, _, right = compute_loss(model, batch)
    torch.testing.assert_close(of_answers, cross_entropy(torch.cat(logits), torch.cat(labels)), atol=1e-5, rtol=1e-5)


def test_what_is_trained_is_what_is_loaded(model, text, options):
    before = model.lm_head.weight.clone()
    train(model, text.tokenizer, options)
    loaded = AutoModelForCausalLM.from_pretrained(options.output_dir, dtype=torch.float16).state_dict()
    assert not torch.equal(before, model.lm_head.weight)
    assert all(torch.equal(tensor.half(), loaded[name]) for name, tensor in model.state_dict().items())
