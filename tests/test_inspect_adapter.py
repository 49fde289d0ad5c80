"""What is said of a prefix is what stock PEFT computes, and a pruned one loses nothing but its virtual tokens."""

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from closeness import ROUNDING, assert_close
from matplotlib.axes import Axes
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from glm_peft.adapters.loading import load_adapter
from glm_peft.convert import main as convert
from glm_peft.examination.adapter_statistics import Prefix, compare_prefixes, measure_norms, read_prefix
from glm_peft.examination.importance_plot import plot_importance
from glm_peft.examination.prefix_importance import (
    Importance,
    Row,
    measure_attention,
    measure_importance,
    measure_losses,
    prune_prefix,
)
from glm_peft.inspect_adapter import main
from glm_peft.models.chat_formats import get_chat_format

ROWS = Path(__file__).parents[1] / "examples" / "demo" / "test.json"
GENERATIONS = ["chatglm", "chatglm2", "chatglm3", "glm4", "glm4_0414"]
LENGTH, KEPT = 6, [0, 3, 4]
IMPORTANCE = Importance([0.25, 0.5], 1.0, 2.0, [0.1, -0.2, 0.3, 0.2], 2, 30)


def load_base(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def save_adapter(base: Path, folder: Path, length: int = LENGTH) -> Path:
    """A prefix of random numbers that are large enough to matter."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    adapted = get_peft_model(load_base(base), config)
    weight = adapted.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(length)))
    adapted.save_pretrained(folder)
    return folder


def make_rows(base: Path) -> list[Row]:
    """Two rows of other lengths, as training has them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat_format, rows = get_chat_format(tokenizer), []
    for question, answer in (("类型#裤*材质#雪纺", "黑色如深夜。"), ("类型#裙", "柔软挺括，宜于四时。")):
        prompt = chat_format.encode_prompt(tokenizer, [{"role": "user", "content": question}]).ids
        ids = chat_format.encode_answer(tokenizer, answer).ids
        rows.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})
    return rows


def seen_only(tokens: list[int]) -> torch.Tensor:
    """A mask [1, P] of the prefix."""
    return torch.tensor([[token in tokens for token in range(LENGTH)]])


@torch.no_grad()
def stock_loss(model: PreTrainedModel | PeftModel, rows: list[Row]) -> float:
    """The loss over all answer tokens of the rows, of transformers' own arithmetic."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        number = int((labels[:, 1:] != -100).sum())
        total += number * float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss)
        count += number
    return total / count


@pytest.fixture(params=GENERATIONS)
def trial(request, tiny_model_dirs, tmp_path) -> tuple[Path, Path, PreTrainedModel, torch.Tensor, list[Row]]:
    """A base and an adapter, where they lie and loaded, and rows."""
    base = tiny_model_dirs[request.param]
    adapter = save_adapter(base, tmp_path / "adapter")
    return base, adapter, load_base(base), read_prefix(str(adapter)).weight, make_rows(base)


# Importance


def test_the_losses_are_those_of_stock_peft_with_the_prefix_and_of_the_base_without(trial):
    base, adapter, model, weight, rows = trial
    importance = measure_importance(model, weight, rows)
    assert importance.loss_without_prefix == pytest.approx(stock_loss(load_base(base), rows), rel=ROUNDING)
    assert importance.loss == pytest.approx(
        stock_loss(PeftModel.from_pretrained(load_base(base), adapter), rows), rel=ROUNDING
    )
    assert abs(importance.loss - importance.loss_without_prefix) > 1e-3
    assert importance.num_answer_tokens == sum(label != -100 for row in rows for label in row["labels"])


def test_a_pruned_prefix_has_the_loss_of_one_whose_other_virtual_tokens_are_masked(trial):
    _, _, model, weight, rows = trial
    pruned = prune_prefix(weight, KEPT, model.config)
    masked = measure_losses(model, weight, rows, seen_only(KEPT))
    every = torch.ones(1, len(KEPT), dtype=torch.bool)
    assert_close(measure_losses(model, pruned, rows, every), masked)
    is_rotary = model.config.model_type != "chatglm"
    unmoved = measure_losses(model, weight[KEPT], rows, every)
    assert (float((unmoved - masked).abs()) > 1e-3) == is_rotary  # the text starts elsewhere


def test_each_change_is_that_of_an_adapter_without_the_token(trial):
    _, _, model, weight, rows = trial
    importance = measure_importance(model, weight, rows)
    for token in range(LENGTH):
        others = [other for other in range(LENGTH) if other != token]
        pruned = prune_prefix(weight, others, model.config)
        loss = measure_losses(model, pruned, rows, torch.ones(1, LENGTH - 1, dtype=torch.bool))
        change = float(loss) - importance.loss
        assert importance.changes[token] == pytest.approx(change, abs=ROUNDING * importance.loss)
    assert max(map(abs, importance.changes)) > 1e-3


def test_how_many_copies_are_run_at_a_time_changes_nothing(trial):
    _, _, model, weight, rows = trial
    one, many = (measure_importance(model, weight, rows, batch_size) for batch_size in (1, 64))
    assert one.changes == pytest.approx(many.changes, abs=ROUNDING * many.loss)


def test_the_attention_is_the_share_of_peft_with_eager_attention(trial):
    base, adapter, model, weight, rows = trial
    shares = measure_attention(model, weight, rows)
    assert model.config._attn_implementation == "sdpa"
    stock = PeftModel.from_pretrained(load_base(base, attn_implementation="eager"), adapter)
    totals, count = torch.zeros(len(shares)), 0
    for row in rows:
        columns = [place - 1 for place, label in enumerate(row["labels"]) if label != -100]
        attentions = stock(input_ids=torch.tensor([row["input_ids"]]), output_attentions=True).attentions
        totals += torch.stack([layer[0, :, columns, :LENGTH].sum(-1).mean(0).sum() for layer in attentions]).detach()
        count += len(columns)
    assert shares == pytest.approx((totals / count).tolist(), rel=ROUNDING)


def test_the_tokens_that_matter_most_are_kept_in_their_order():
    assert IMPORTANCE.most_important(2) == [2, 3]
    assert IMPORTANCE.most_important(3) == [0, 2, 3]


# Numbers


def make_prefix(keys: list[list[float]], values: list[list[float]]) -> Prefix:
    """A prefix of one layer; a row for each virtual token."""
    return Prefix("made", torch.tensor([key + value for key, value in zip(keys, values, strict=True)]), 1, None, False)


def test_norms_are_those_of_each_virtual_token():
    (layer,) = measure_norms(make_prefix([[3.0, 4.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 4.0]]))
    assert [layer[f"keys_{name}"] for name in ("mean", "lowest", "highest")] == [3, 1, 5]
    assert [layer[f"values_{name}"] for name in ("mean", "lowest", "highest")] == [3, 2, 4]
    assert layer["keys_to_values"] == 1


def test_layers_keys_and_values_are_told_apart_as_peft_stores_them(tiny_model_dirs, tmp_path):
    base = tiny_model_dirs["chatglm3"]
    adapter = save_adapter(base, tmp_path)
    cache = PeftModel.from_pretrained(load_base(base), adapter).get_prompt(batch_size=1)
    for index, norms in enumerate(measure_norms(read_prefix(str(adapter)))):
        for kind, states in (("keys", cache.layers[index].keys), ("values", cache.layers[index].values)):
            expected = states[0].transpose(0, 1).flatten(1).norm(dim=1)
            assert norms[f"{kind}_mean"] == pytest.approx(float(expected.detach().mean()), rel=1e-5)


def test_cosine_and_distance_are_of_keys_and_values_apart():
    one = make_prefix([[3.0, 4.0]], [[1.0, 0.0]])
    other = make_prefix([[6.0, 8.0]], [[0.0, 1.0]])
    (layer,) = compare_prefixes(one, other)
    assert [layer[f"keys_{name}"] for name in ("cosine", "distance", "relative_distance")] == pytest.approx([1, 5, 1])
    assert [layer[f"values_{name}"] for name in ("cosine", "distance")] == pytest.approx([0, math.sqrt(2)])


def test_the_cosine_with_zeros_is_no_number():
    (layer,) = compare_prefixes(make_prefix([[3.0]], [[1.0]]), make_prefix([[0.0]], [[1.0]]))
    assert math.isnan(layer["keys_cosine"]) and layer["values_cosine"] == 1


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
@pytest.mark.parametrize("tag", ["prefix", "prefix_projection"])
def test_a_published_checkpoint_is_read_without_a_base_as_it_is_imported(name, tag, reference_models, tmp_path):
    base, checkpoint = reference_models / name, reference_models / name / f"ptuning-{tag}"
    convert(["import", str(checkpoint), "--base", str(base), "--output_dir", str(tmp_path)])
    published, imported = read_prefix(str(checkpoint)), read_prefix(str(tmp_path))
    assert published.is_published and not imported.is_published
    assert (published.num_layers, published.width) == (imported.num_layers, imported.width)
    assert all(layer["keys_distance"] < 1e-5 for layer in compare_prefixes(published, imported))


# The command


def type_command(*words: object) -> None:
    main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one sentence with which the command ends."""
    with pytest.raises(SystemExit) as stopped:
        type_command(*words)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_adapter_alone_is_described_without_a_base(tiny_model_dirs, tmp_path, capsys):
    adapter = save_adapter(tiny_model_dirs["chatglm3"], tmp_path)
    before = sorted(tmp_path.iterdir())
    type_command(adapter)
    printed = capsys.readouterr().out
    assert f"Prefix {adapter}" in printed
    assert "6 virtual tokens x 2 layers x (key + value) x" in printed
    (first,) = [line.split() for line in printed.splitlines() if line.split()[:1] == ["0"]]
    assert first[1] == f"{measure_norms(read_prefix(str(adapter)))[0]['keys_mean']:.3f}"
    assert sorted(tmp_path.iterdir()) == before


def test_two_adapters_are_compared(tiny_model_dirs, tmp_path, capsys):
    base = tiny_model_dirs["chatglm3"]
    adapter = save_adapter(base, tmp_path / "one")
    shutil.copytree(adapter, tmp_path / "other")
    type_command(adapter, tmp_path / "other", "--output_dir", tmp_path / "out")
    assert f"{adapter} against {tmp_path / 'other'}" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert [layer["values_cosine"] for layer in found["comparison"]] == pytest.approx([1, 1])
    assert [layer["keys_distance"] for layer in found["comparison"]] == [0, 0]


def test_a_published_checkpoint_that_says_nothing_of_its_base_needs_it(reference_models, tmp_path, capsys):
    base = reference_models / "chatglm2-6b"
    checkpoint = shutil.copytree(base / "ptuning-prefix", tmp_path / "checkpoint")
    (checkpoint / "config.json").unlink()
    assert "how many layers its prefix is for" in refusal(capsys, checkpoint)
    type_command(checkpoint, "--base", base)
    assert "5 virtual tokens x 3 layers" in capsys.readouterr().out


def test_the_whole_command_prunes_and_stock_peft_reads_what_is_left(trial, tmp_path, capsys):
    base, adapter, _, _, _ = trial
    small, words = tmp_path / "small", ("--base", base, "--test_file", ROWS, "--max_predict_samples", 2)
    type_command(adapter, *words, "--prune", 2, "--output_dir", small)
    printed = capsys.readouterr().out
    assert {path.name for path in small.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "provenance.json"),
        *("inspection.json", "prefix_importance.png"),
    }
    found = json.loads((small / "inspection.json").read_text())
    pruned, importance = found["pruned"], Importance(**found["importance"])
    assert pruned["kept"] == importance.most_important(2)
    assert f"loss {pruned['loss']:.4f} with these 2, {importance.loss:.4f} with all" in printed
    record = json.loads((small / "provenance.json").read_text())
    assert record["pruned_from"]["name"] == "adapter" and record["pruned_from"]["num_virtual_tokens"] == LENGTH
    assert record["kept_virtual_tokens"] == pruned["kept"] and record["scores"]["loss"] == pruned["loss"]
    assert str(tmp_path) not in (small / "provenance.json").read_text()
    stock = PeftModel.from_pretrained(load_base(base), small)
    assert stock.active_peft_config.num_virtual_tokens == 2
    assert stock_loss(stock, encode_file(base, 2)) == pytest.approx(pruned["loss"], rel=ROUNDING)


def encode_file(base: Path, number: int) -> list[Row]:
    """The first rows of the demo's file, encoded by hand."""
    tokenizer, rows = AutoTokenizer.from_pretrained(base), []
    chat_format = get_chat_format(tokenizer)
    for row in [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:number]]:
        prompt = chat_format.encode_prompt(tokenizer, [{"role": "user", "content": row["content"]}], max_length=1024)
        answer = chat_format.encode_answer(tokenizer, row["summary"], max_length=128)
        rows.append({"input_ids": prompt.ids + answer.ids, "labels": [-100] * len(prompt.ids) + answer.ids})
    return rows


def test_a_pruned_published_checkpoint_is_a_stock_adapter(reference_models, tiny_model_dirs, tmp_path, capsys):
    base = tiny_model_dirs["chatglm2"]
    adapter = save_adapter(base, tmp_path / "adapter")
    convert(["export", str(adapter), "--base", str(base), "--output_dir", str(tmp_path / "published")])
    words = ("--base", base, "--test_file", ROWS, "--max_predict_samples", 1, "--prune", 3)
    type_command(adapter, *words, "--output_dir", tmp_path / "one")
    type_command(tmp_path / "published", *words, "--output_dir", tmp_path / "other")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert_close(one, other)
    assert load_adapter(load_base(base), str(tmp_path / "other")).active_peft_config.num_virtual_tokens == 3


def test_adapters_of_other_sizes_are_not_compared(tiny_model_dirs, tmp_path, capsys):
    base = tiny_model_dirs["chatglm3"]
    adapter, other = save_adapter(base, tmp_path / "one"), save_adapter(base, tmp_path / "other", length=4)
    error = refusal(capsys, adapter, other)
    assert "6 virtual tokens" in error and "4 virtual tokens" in error and "differ in size" in error


def test_what_is_no_prefix_or_no_adapter_is_refused(tiny_model_dirs, tmp_path, capsys):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(load_base(tiny_model_dirs["chatglm3"]), lora).save_pretrained(tmp_path / "lora")
    assert "is a LORA adapter: only a prefix can be inspected" in refusal(capsys, tmp_path / "lora")
    assert f"{tmp_path / 'nothing'} is not there, and a PEFT adapter or" in refusal(capsys, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "One adapter or two stand before the flags, found 0"),
        (("one", "two", "three"), "One adapter or two stand before the flags, found 3"),
        (("one", "--test_file", "rows.json"), "give --base too"),
        (("one", "--prune", "2", "--base", "base"), "give all three"),
        (("one", "--prune", "0"), "--prune must be at least 1, found 0"),
        (("one", "--output_dir", "./one"), "is the folder of the adapter itself"),
        (("one", "--bass", "base"), "the nearest is base"),
    ],
)
def test_flags_that_cannot_be_followed_are_named(words, said, capsys):
    assert said in refusal(capsys, *words)


def test_pruning_to_as_many_as_there_are_is_refused_before_the_base_is_loaded(tiny_model_dirs, tmp_path, capsys):
    base = tiny_model_dirs["chatglm3"]
    adapter = save_adapter(base, tmp_path / "adapter")
    words = ("--base", base, "--test_file", tmp_path / "nothing.json", "--output_dir", tmp_path / "out")
    assert "--prune 6 leaves nothing out of the 6 virtual tokens" in refusal(capsys, adapter, *words, "--prune", 6)
    assert not (tmp_path / "out").exists()


def test_a_prefix_of_another_base_is_refused(tiny_model_dirs, tmp_path, capsys):
    adapter = save_adapter(tiny_model_dirs["chatglm3"], tmp_path)
    assert "The prefix in" in refusal(capsys, adapter, "--base", tiny_model_dirs["chatglm"])


# The picture


def draw(path: Path, importance: Importance, kept: tuple[int, ...] = ()) -> list[tuple[list[float], object]]:
    """The heights and colours of each panel's bars, as they were handed to matplotlib."""
    panels, bar = [], Axes.bar

    def note(axes: Axes, places: range, heights: list[float], **options: object) -> object:
        panels.append((list(heights), options["color"]))
        return bar(axes, places, heights, **options)

    with mock.patch.object(Axes, "bar", note):
        plot_importance(importance, path, kept)
    return panels


def test_the_picture_has_a_bar_for_each_layer_and_each_virtual_token(tmp_path):
    (attention, _), (changes, colours) = draw(tmp_path / "new" / "picture.png", IMPORTANCE, (2, 3))
    assert attention == [25, 50] and changes == IMPORTANCE.changes
    assert colours[0] == colours[1] != colours[2] == colours[3]
    data = (tmp_path / "new" / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24]) == (1344, 456)


def test_without_pruning_all_bars_are_alike(tmp_path):
    _, (_, colours) = draw(tmp_path / "picture.png", replace(IMPORTANCE, changes=[0.0] * 128))
    assert len(set(colours)) == 1 and len(colours) == 128
