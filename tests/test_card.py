"""The model card: what it says of a run, that its code runs, and that it tells nothing of the machine."""

import getpass
import json
import math
import re
import shlex
import shutil
import socket
import statistics
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import PrefixTuningConfig
from safetensors.torch import load_file

from glm_peft import train
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import parse_predict_arguments
from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.errors import UserError
from glm_peft.hub.rights import is_hub_id
from glm_peft.metrics import compute_scores, score_pair
from glm_peft.models.loading import choose_dtype
from glm_peft.preprocessing.conversations import Conversation
from glm_peft.provenance.ownership import digest_weights
from glm_peft.provenance.recipe import describe_flags
from glm_peft.provenance.record import find_languages, read_licence
from glm_peft.publishing.card.build import TEMPLATES, build_card
from glm_peft.publishing.card.facts import _size, read_facts
from glm_peft.publishing.card.markdown import escape, escape_cell, shorten

BASE = "somebody/chatglm3"  # a folder as seen from the fixture's place, and an id as seen by the card
ADAPTER = "runs/adapter"
SECRET = "hf_ThisTokenIsNobodysEither"
LANGUAGES = sorted(TEMPLATES)
SIZES = "--num_virtual_tokens 4 --max_source_length 64 --max_target_length 32 --max_new_tokens 6 --use_cpu true "
SIZES += "--max_steps 12 --learning_rate 0.3 --logging_steps 4 --per_device_train_batch_size 4 --save_strategy no "
SIZES += "--disable_tqdm true --full_determinism"
EVERYTHING = "--do_train --do_eval --predict_with_generate --do_predict"
ROWS = [
    {"content": f"类型#{kind}*颜色#{colour}", "summary": f"这条{kind}是{colour}的" + "，很好看" * len(kind)}
    for kind in ("裤", "裙", "衬衫", "外套")
    for colour in ("白色", "黑色", "米色")
]
LICENCE = "---\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE\n---\n"


class Place:
    """A folder with data, a base under a relative name, and what runs left there."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, folder / BASE
        shutil.copytree(base, self.base)
        for name in ("train", "validation", "test"):
            self.write(f"data/{name}.json", ROWS if name == "train" else ROWS[:5])

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")

    def train(self, output_dir: str, *words: str) -> Path:
        """Runs the command in the place, everything by its whole path but the output folder."""
        files = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", self.data(name))]
        self.run("--model_name_or_path", str(self.base), "--output_dir", output_dir, *files, *SIZES.split(), *words)
        return self.folder / output_dir

    def run(self, *words: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["train.py", *words])
            patch.setenv("HF_TOKEN", SECRET)
            train.main()

    def data(self, name: str) -> str:
        return str(self.folder / "data" / f"{name}.json")


@pytest.fixture(scope="module")
def place(tiny_model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("card"), tiny_model_dirs["chatglm3"])


@pytest.fixture(scope="module")
def adapter(place: Place) -> Path:
    """The output folder of a run that was evaluated."""
    return place.train(ADAPTER, *EVERYTHING.split(), "--source_prefix", "写一段：", "--max_eval_samples", "5")


@pytest.fixture(scope="module")
def untested(place: Place) -> Path:
    """The output folder of a run that only trained, and logged nothing."""
    return place.train("runs/untested", "--do_train", "--logging_steps", "100", "--card_language", "zh")


def copy_of(folder: Path, target: Path, **record: Any) -> Path:
    """A copy of an adapter with other things in its record."""
    shutil.copytree(folder, target)
    file = target / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | record), encoding="utf-8")
    return target


def with_predictions(folder: Path, target: Path, *texts: str | None, **more: Any) -> Path:
    """A copy of an adapter without a source prefix, with one row of predictions: prompt, reference and answer."""
    copy_of(folder, target, prompt={"source_prefix": None} | more.pop("prompt", {}))
    row = dict(zip(("prompt", "labels", "predict"), texts, strict=True)) | more
    (target / "generated_predictions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return target


def metadata_of(card: str) -> dict[str, Any]:
    """As the Hub's client reads it, which refuses metadata of a wrong form."""
    found = ModelCard(card).data.to_dict()
    assert found == yaml.safe_load(card.split("---\n")[1])
    return found


def body_of(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def tokens_of(card: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(body_of(card))


def blocks(card: str, language: str) -> list[str]:
    return [token.content for token in tokens_of(card) if token.type == "fence" and token.info == language]


def commands(card: str) -> list[list[str]]:
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks(card, "bash")]


def seen(token: Token) -> str:
    """What a reader sees of a paragraph or cell."""
    shown = {"softbreak": "\n", "html_inline": "\n"}
    assert all(child.content == "<br>" for child in token.children if child.type == "html_inline")
    return "".join(shown.get(child.type, child.content) for child in token.children)


def tables(card: str) -> Iterator[list[list[str]]]:
    """The cells of every table, the head first, as a reader sees them."""
    rows: list[list[str]] = []
    for token in tokens_of(card):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level >= 4:
            rows[-1].append(seen(token))
        elif token.type == "table_close":
            yield rows


def section(card: str, title: str) -> str:
    return f"\n{body_of(card)}".split(f"\n## {title}\n")[1].split("\n## ")[0]


def score_table(card: str, title: str = "Scores") -> dict[str, list[str]]:
    """The first table of scores: name → value and interval."""
    return {row[0]: row[1:] for row in next(tables("\n---\n" + section(card, title)))[1:]}


# What training writes


def test_training_writes_the_card_that_the_folder_gives(adapter, untested):
    for folder in (adapter, untested):
        assert (folder / "README.md").read_bytes() == build_card(folder).encode()


def test_the_same_folder_elsewhere_gives_the_same_card(adapter, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert build_card("elsewhere") == build_card(adapter) == build_card(str(adapter))


def test_the_language_of_the_card_is_the_one_that_training_was_given(untested, adapter):
    assert "## 局限" in build_card(untested) and "## Limits" not in build_card(untested)
    assert "## Limits" in build_card(adapter) and "## Limits" in build_card(untested, language="en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_of_the_machine_is_told(language, adapter, untested, place, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = [build_card(folder, language=language) for folder in (adapter, untested)]
    found += [(folder / "provenance.json").read_text(encoding="utf-8") for folder in (adapter, untested)]
    for text in found:
        for secret in (str(place.folder), place.folder.name, str(Path.home()), SECRET, "/tmp/"):
            assert secret not in text
        for word in (getpass.getuser(), socket.gethostname()):
            assert not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), word
        assert not re.search(r"(?<![\w.:/-])/[\w.-]+/", text)


# Metadata


def test_the_metadata_name_base_language_and_what_it_is(adapter):
    found = metadata_of(build_card(adapter, BASE))
    expected = {"library_name": "peft", "base_model": BASE, "base_model_relation": "adapter", "language": ["zh"]}
    expected |= {"pipeline_tag": "text-generation", "tags": ["p-tuning-v2", "prefix-tuning", "chatglm"]}
    assert {name: found.get(name) for name in expected} == expected
    assert not found.keys() & {"license", "license_name", "license_link", "datasets"}


def test_a_base_in_a_folder_is_no_base_model_of_the_hubs(adapter):
    card = build_card(adapter)
    assert "base_model" not in card.split("---\n")[1]
    assert "The base was in a folder called `chatglm3`" in card and "path/to/chatglm3" in card


def test_the_model_index_has_the_scores_on_the_named_data_sets(adapter):
    results = json.loads((adapter / "all_results.json").read_text())
    found = {
        (result.dataset_split, result.metric_name): result
        for result in ModelCard(build_card(adapter)).data.eval_results
    }
    names = {"ROUGE-1": "rouge-1", "ROUGE-2": "rouge-2", "ROUGE-L": "rouge-l", "BLEU-4": "bleu-4"}
    for split, prefix in (("test", "predict_"), ("validation", "eval_")):
        for shown, name in names.items():
            result = found[split, shown]
            assert result.metric_value == pytest.approx(results[prefix + name], abs=1e-4)
            assert (result.dataset_name, result.dataset_type) == (f"{split}.json", "json")
            assert result.metric_config == "chatglm3"
    assert found["validation", "loss, nats per token"].metric_value == pytest.approx(results["eval_loss"], abs=1e-4)


def test_scores_that_are_not_finite_are_left_out(adapter, tmp_path):
    folder = copy_of(adapter, tmp_path / "folder")
    results = json.loads((folder / "all_results.json").read_text()) | {"eval_loss": math.nan}
    (folder / "all_results.json").write_text(json.dumps(results))
    assert "nan" not in build_card(folder).lower().replace("finance", "")


def test_a_hub_data_set_is_named_with_its_configuration(adapter, tmp_path):
    data = {
        name: {"dataset": "owner/rows", "config": "small", "rows": 5, "rows_sha256": "0" * 64}
        for name in ("train", "test")
    }
    folder = copy_of(adapter, tmp_path / "folder", data=data)
    for file in (folder / "all_results.json", folder / "predict_results.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"data": {"test": data["test"]}}))
    card = build_card(folder)
    assert metadata_of(card)["datasets"] == ["owner/rows"]
    (result, *_) = [one for one in ModelCard(card).data.eval_results if one.dataset_split == "test"]
    assert (result.dataset_type, result.dataset_config) == ("owner/rows", "small")
    assert f"| `owner/rows` (small) | 5 | `{'0' * 64}` |" in card


# Licence


def test_the_licence_is_what_the_bases_own_card_says(place):
    (place.base / "README.md").write_text(LICENCE)
    try:
        folder = place.train("runs/licence", "--do_train", "--max_steps", "1")
    finally:
        (place.base / "README.md").unlink()
    found = metadata_of(build_card(folder, "somebody/chatglm3"))
    assert (found["license"], found["license_name"]) == ("other", "its-own")
    assert found["license_link"] == "https://huggingface.co/somebody/chatglm3/blob/main/LICENSE"
    assert "license_link" not in metadata_of(build_card(folder))


CARD = "---\nlanguage: zh\n{}---\n# A model\n"
OTHER = {"license": "other", "license_name": "glm-4", "license_link": "https://example.org/licence"}


@pytest.mark.parametrize(
    "card, expected",
    [
        (None, {}),
        (CARD.format("license: mit\n"), {"license": "mit"}),
        (CARD.format(yaml.safe_dump(OTHER)), OTHER),
        (CARD.format(""), {}),
        (CARD.format("license_name: mit\n"), {}),
        ("no metadata\nlicense: mit\n", {}),
        ("---\n- a\n- list\n---\n", {}),
        ("---\n1: license\n---\n", {}),
        ("---\nlicense: [broken\n---\n", {}),
        (CARD.format("license: 3\n"), {}),
    ],
)
def test_of_a_licence_only_what_the_bases_card_states_is_recorded(card, expected, tmp_path):
    if card:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert read_licence(ModelArguments(str(tmp_path))) == expected


def test_a_base_that_cannot_be_reached_has_no_known_licence():
    assert read_licence(ModelArguments("somebody/base-that-is-not-here")) == {}


def test_an_unknown_licence_is_said_to_be_unknown(adapter):
    assert "The licence of the base is not known here" in build_card(adapter)


# Where it comes from


@pytest.mark.parametrize(
    "kind, words",
    [
        ("continued_from", "It started from `older`."),
        ("pruned_from", "It was made from `older` by leaving out virtual tokens."),
        ("converted_from", "It was made from the published checkpoint `older`."),
    ],
)
def test_what_it_was_made_from_is_told(kind, words, adapter, tmp_path):
    assert words in build_card(copy_of(adapter, tmp_path / "folder", **{kind: {"name": "older"}}))


def test_the_commit_of_the_base_is_told(adapter, tmp_path):
    base = {"name": "owner/base", "revision": "1" * 40}
    card = build_card(copy_of(adapter, tmp_path / "folder", base=base))
    assert f"Of the base, commit `{'1' * 40}` was used." in card and metadata_of(card)["base_model"] == "owner/base"


def test_a_stop_in_between_is_told(adapter, tmp_path):
    (stretch,) = json.loads((adapter / "provenance.json").read_text())["stretches"]
    resumed = stretch | {"start": "checkpoint", "steps": [12, 20], "seconds": 4.5}
    other = resumed | {"data": stretch["data"] | {"file": "other.json", "sha256": "f" * 64, "rows_sha256": "f" * 64}}
    repeats = "this command repeats the run"
    for second, is_repeated in ((resumed, True), (other, False)):
        card = build_card(copy_of(adapter, tmp_path / str(is_repeated), stretches=[stretch, second]))
        (_, *rows) = next(table for table in tables(card) if table[0][0] == "steps")
        assert [row[0] for row in rows] == ["1–12", "13–20"] and rows[1][4] == "4.5"
        assert (repeats in card) is is_repeated
    assert "12 rows of `train.json`, then 12 rows of `other.json`" in card
    former = copy_of(adapter, tmp_path / "former", stretches=None, resumed=True)  # as earlier versions recorded it
    assert repeats not in build_card(former) and repeats in build_card(adapter)


# Examples


def test_the_examples_are_the_first_predictions(adapter):
    lines = (adapter / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    (head, *found) = next(tables(build_card(adapter)))
    assert head == ["prompt", "reference", "answer"]
    assert found == [["写一段：" + row["prompt"], row["labels"], row["predict"].strip()] for row in rows[:3]]
    assert "The first 3 of 5 rows of `test.json`" in build_card(adapter)


@pytest.mark.parametrize("language", LANGUAGES)
def test_as_many_examples_stand_in_the_card_as_are_asked_for(language, adapter, tmp_path):
    assert len(next(tables(build_card(adapter, language=language, examples=1)))) == 2
    card = build_card(copy_of(adapter, tmp_path / "folder", card_examples=0), language=language)
    assert "`--card_examples 0`" in card and not any(row["content"] in card for row in ROWS)
    assert all('"content": "写一段：你好"' in code for code in blocks(card, "python"))


def test_a_conversation_is_asked_with_its_system_text_and_earlier_turns(adapter, tmp_path):
    turns = [("system", "短\n答"), ("user", "一"), ("assistant", "二"), ("user", "三")]
    messages = [{"role": role, "content": content} for role, content in turns]
    asked = [*messages[:3], {"role": "user", "content": "问：三"}]
    for number, (shown, sent) in enumerate(((messages, asked), (messages[:1] + messages[3:], asked[:1] + asked[3:]))):
        folder = tmp_path / str(number)
        prompt = {"source_prefix": "问：", "system_text": "别的"}
        card = build_card(with_predictions(adapter, folder, "三", "四", "五", messages=shown, prompt=prompt))
        cell = "\n".join(f"{message['role']}: {message['content']}" for message in sent)
        assert list(tables(card))[0][1] == [cell, "四", "五"]
        assert all(f"messages = {json.dumps(sent, ensure_ascii=False)}\n" in code for code in blocks(card, "python"))
        written, _, command = blocks(card, "bash")[0].rpartition("python -m glm_peft.predict")
        words = shlex.split(command.replace("\\\n", " "))
        _, data_args, predict_args = parse_predict_arguments(words)
        assert data_args.source_prefix == "问："
        if number == 0:  # more than a question does not fit into --prompt
            printf, form, row, arrow, file = shlex.split(written)
            assert (json.loads(row), file) == ({"messages": shown}, data_args.test_file)
        else:
            assert (written, predict_args.prompt, data_args.system_text) == ("", "三", "短\n答")


NASTY = [
    "a | b || c",
    "`code` ``` *b* _i_ __b__ **b** snake_case ~~s~~",
    "# no heading",
    "<script>alert(1)</script> &amp; &lt; <br> <!-- -->",
    "line\nbreak\r\n\n> quote\n- item",
    "[link](https://x) ![x](y) <https://x> $$x$$",
    "\\ \\| \\\\| back\\",
    "控制\x00符\t号\u2028行",
    "| --- |",
    "{{ 7 * 7 }} {% if x %} {# y #} {{ self }}",
    "---\nlicense: mit\n---",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_is_shown_as_it_is(text, adapter, tmp_path):
    card = build_card(with_predictions(adapter, tmp_path / "folder", text, text, text))
    (_, row) = next(tables(card))
    lines = re.sub("[\x00\t]", " ", re.sub("\r\n|\u2028", "\n", text)).split("\n")
    assert [[" ".join(line.split()) for line in cell.split("\n")] for cell in row] == 3 * [
        [" ".join(line.split()) for line in lines]
    ]
    assert not any(token.type == "html_block" for token in tokens_of(card))
    assert [token.tag for token in tokens_of(card) if token.type == "heading_open"].count("h1") == 1


@pytest.mark.parametrize("text", NASTY)
def test_an_escaped_paragraph_is_a_paragraph(text):
    (_, inline, _) = MarkdownIt("commonmark").parse("x " + escape(text))
    assert {child.type for child in inline.children} <= {"text", "text_special"}


def test_long_texts_are_cut_at_the_length_that_is_said(adapter, tmp_path):
    card = build_card(with_predictions(adapter, tmp_path / "folder", "问" * 201, "答" * 200, "长" * 999))
    (_, row) = next(tables(card))
    assert row == ["问" * 199 + "…", "答" * 200, "长" * 199 + "…"]
    assert "more than 200 characters" in card
    assert [shorten("问答", limit) for limit in (1, 2, 3)] == ["…", "问答", "问答"]


def test_a_row_without_a_reference_is_shown_without_one(adapter, tmp_path):
    (_, row) = next(tables(build_card(with_predictions(adapter, tmp_path / "folder", "问", None, "答"))))
    assert row == ["问", "–", "答"]


def test_without_predictions_there_are_no_examples_and_the_card_says_so(untested):
    assert "There are none" in section(build_card(untested, language="en"), "Examples")
    assert escape_cell("a\nb", 3) == "a<br>b"


# Use


def test_the_code_loads_the_adapter_and_gives_the_answer_of_the_predictions(adapter, place, monkeypatch, capsys):
    monkeypatch.chdir(place.folder)
    expected = json.loads((adapter / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (stock, toolkit) = blocks(build_card(adapter, BASE, adapter_id=ADAPTER), "python")
    for code in (stock, toolkit):
        capsys.readouterr()
        loaded: dict[str, Any] = {}
        exec(code, loaded)
        assert capsys.readouterr().out.strip() == expected["predict"].strip() != ""
        prefix = loaded["model"].get_prompt_embedding_to_save("default")
        assert prefix.equal(load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"])


@pytest.mark.parametrize(
    "generation, peft_type, words",
    [
        ("chatglm", "prefix_tuning", "A P-Tuning v2 prefix of 4 virtual tokens"),
        ("chatglm2", "lora", "A LoRA adapter"),
        ("glm4", "none", "all of it trained"),
        ("glm4_0414", "prompt_tuning", "A prompt tuning adapter of 4 virtual tokens"),
    ],
)
def test_the_code_runs_for_every_generation_and_method(
    generation, peft_type, words, tiny_model_dirs, tmp_path, monkeypatch, capsys
):
    place = Place(tmp_path, tiny_model_dirs[generation])
    length = "" if "prompt" in peft_type or "prefix" in peft_type else "--num_virtual_tokens 4 "
    command = [*SIZES.replace(length, "").split(), "--peft_type", peft_type, "--do_train", "--do_predict"]
    files = ["--train_file", place.data("train"), "--test_file", place.data("test")]
    place.run("--model_name_or_path", str(place.base), "--output_dir", ADAPTER, *files, *command, "--max_steps", "4")
    card = build_card(tmp_path / ADAPTER, BASE, adapter_id=ADAPTER)
    assert words in card and metadata_of(card)["base_model"] == BASE
    monkeypatch.chdir(tmp_path)
    printed = []
    for code in blocks(card, "python"):
        capsys.readouterr()
        exec(code, {})
        printed.append(capsys.readouterr().out.strip())
    lines = (tmp_path / ADAPTER / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert printed == [json.loads(lines[0])["predict"].strip()] * 2
    parse_predict_arguments(commands(card)[0][3:])


def test_the_command_of_prediction_parses_and_has_what_the_run_had(adapter):
    command = commands(build_card(adapter, BASE, adapter_id="owner/adapter"))[0]
    assert command[:3] == ["python", "-m", "glm_peft.predict"]
    model_args, data_args, predict_args = parse_predict_arguments(command[3:])
    assert (model_args.model_name_or_path, model_args.adapter_name_or_path) == (BASE, "owner/adapter")
    assert (predict_args.max_new_tokens, predict_args.prompt) == (6, ROWS[0]["content"])
    assert data_args.source_prefix == "写一段："


def test_where_it_is_to_be_found_is_left_to_the_reader(adapter):
    card = build_card(adapter)
    assert "`path/to/adapter` is the folder that this card is in" in card
    assert '"path/to/adapter"' in blocks(card, "python")[0]


def test_prompts_that_the_tokenizer_does_not_know_are_left_to_the_toolkit(adapter, tmp_path):
    recipe = json.loads((adapter / "provenance.json").read_text())["recipe"] | {"chat_format": "plain"}
    folder = copy_of(adapter, tmp_path / "folder", recipe=recipe, chat_format="plain")
    (stock, toolkit) = blocks(build_card(folder), "python")
    assert "apply_chat_template" not in stock and 'get_chat_format(tokenizer, "plain")' in toolkit
    assert parse_predict_arguments(commands(build_card(folder))[0][3:])[0].chat_format == "plain"


# Recipe


def test_the_recipe_repeats_the_run(adapter, place):
    command = commands(build_card(adapter, BASE))[1]
    launched = launch_command_parser().parse_args(command[2:])
    assert command[:2] == ["accelerate", "launch"] and launched.training_script == "glm_peft/train.py"
    assert launched.config_file == "accelerate_configs/cpu.yaml"
    for name in ("train", "validation", "test"):
        shutil.copy(place.data(name), place.folder)
    place.run(*launched.training_script_args)
    repeated = place.folder / "output" / "repeated"
    for name in ("adapter_model.safetensors", "generated_predictions.jsonl"):
        assert (repeated / name).read_bytes() == (adapter / name).read_bytes()
    scores = [json.loads((folder / "provenance.json").read_text())["scores"] for folder in (repeated, adapter)]
    assert scores[0] == scores[1]


def test_the_recipe_has_every_flag_that_was_given_and_of_files_the_names(adapter, place):
    words = commands(build_card(adapter))[1]
    arguments = parse_train_arguments(words[words.index("glm_peft/train.py") + 1 :])
    data_args, training_args = arguments.data, arguments.training
    assert data_args.train_file == "train.json" and data_args.source_prefix == "写一段："
    assert (training_args.max_steps, training_args.learning_rate) == (12, 0.3)
    assert (
        training_args.full_determinism
        and training_args.output_dir == "output/repeated"
        and "--disable_tqdm" not in words
    )
    assert "| `max_steps` | 12 |" in build_card(adapter)


@pytest.mark.parametrize(
    "name, value",
    [
        ("source_prefix", 'it\'s `x` "y" $HOME \\ 中文\n--do_eval'),
        ("target_modules", ["q_proj", "v_proj"]),
        ("lr_scheduler_kwargs", '{"min_lr": 1e-06}'),
        ("learning_rate", 1e-05),
        ("packing", False),
        ("prefix_init_text", "-1 bis"),
    ],
)
def test_any_value_comes_through_the_shell(name, value, adapter, tmp_path):
    folder = copy_of(adapter, tmp_path / "folder", flags={"do_train": True, "train_file": "x.json", name: value})
    command = read_facts(folder).commands.train
    words = shlex.split(command.replace(" \\\n", " "))
    place = next(index for index, word in enumerate(words) if word.partition("=")[0] == f"--{name}")
    joined = words[place].partition("=")[2]
    expected = value if isinstance(value, list) else [value if isinstance(value, str) else json.dumps(value)]
    assert ([joined] if joined else words[place + 1 : place + 1 + len(expected)]) == expected
    assert command in blocks(build_card(folder), "bash")[1]


@pytest.mark.parametrize(
    "hardware, expected",
    [
        ({"kind": "cpu", "processes": 1, "engine": "NO"}, "cpu.yaml glm_peft"),
        ({"kind": "cuda", "processes": 1, "engine": "NO"}, "single_gpu.yaml glm_peft"),
        ({"kind": "cuda", "processes": 4, "engine": "MULTI_GPU"}, "multi_gpu.yaml --num_processes 4 glm_peft"),
        ({"kind": "cuda", "processes": 2, "engine": "FSDP"}, "fsdp2.yaml --num_processes 2 glm_peft"),
        ({"kind": "cuda", "processes": 2, "engine": "DEEPSPEED", "zero_stage": 2}, "zero2.yaml --num_processes 2 "),
        ({"kind": "cuda", "processes": 2, "engine": "DEEPSPEED", "zero_stage": 3}, "fsdp2.yaml --num_processes 2 "),
        ({"kind": "cpu", "processes": 2, "engine": "MULTI_CPU"}, "cpu_2_processes.yaml --num_processes 2 "),
    ],
)
def test_the_recipe_is_launched_as_the_run_was(hardware, expected, adapter, tmp_path):
    card = build_card(copy_of(adapter, tmp_path / "folder", hardware=hardware))
    assert expected in card
    (config,) = set(re.findall(r"accelerate_configs/\w+\.yaml", card))
    assert (Path(train.__file__).parents[1] / config).is_file()


def given_flags(**given: Any) -> DataArguments | ModelArguments | TrainingArguments:
    """Arguments of the kind that has these flags, as the command line would have given them."""
    kinds = (DataArguments, ModelArguments, TrainingArguments)
    arguments = object.__new__(next(kind for kind in kinds if given.keys() <= kind.__dataclass_fields__.keys()))
    object.__setattr__(arguments, "given", given)
    return arguments


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("train_file", "/home/somebody/rows.json", "rows.json"),
        ("train_file", "../rows.json", "rows.json"),
        ("validation_file", "a=/home/x/a.json, b=~/b.json", "a=a.json,b=b.json"),
        ("model_name_or_path", "/cache/models--o--n/snapshots/" + "0" * 40, "o/n"),
        ("deepspeed", '{"a": "/home/x/y.json", "b": [1, "/z/w"]}', '{"a": "y.json", "b": [1, "w"]}'),
        ("dataset_name", "owner/name", "owner/name"),
        ("source_prefix", "/no path", "/no path"),
        ("target_modules", ["q_proj"], ["q_proj"]),
        ("learning_rate", 0.1, 0.1),
    ],
)
def test_of_files_and_folders_only_the_names_are_told(name, value, told):
    assert describe_flags(given_flags(**{name: value})) == {name: told}


def test_where_a_run_was_and_whom_it_told_is_not_told():
    given = {"output_dir": "/x", "report_to": ["wandb"], "run_name": "mine", "hub_model_id": "me/x"}
    assert describe_flags(given_flags(**given), given_flags(cache_dir="/y")) == {}


# Data and scores


def test_the_data_are_told_with_their_fingerprints(adapter):
    record = json.loads((adapter / "provenance.json").read_text())
    card = build_card(adapter)
    for name, shown in (("train", "training"), ("validation", "validation"), ("test", "test")):
        data = record["data"][name]
        assert f"| {shown} | `{name}.json` | {data['rows']} | `{data['sha256']}` |" in card
    assert "Language of the rows, as detected: Chinese." in card


def test_the_scores_are_those_of_the_run_with_the_number_of_examples(adapter):
    results = json.loads((adapter / "all_results.json").read_text())
    card = build_card(adapter)
    shown = score_table(card)
    assert shown["ROUGE-L"][0] == f"{results['predict_rouge-l']:.2f}"
    assert shown["BLEU-4"][0] == f"{results['predict_bleu-4']:.4f}"
    assert "On the test set (`test.json`), 5 examples:" in card and "Protocol `chatglm3`" in card
    assert "On the validation set (`validation.json`), 5 examples:" in card


@pytest.mark.parametrize(
    "flags, words",
    [
        ({}, "Answers of 6 tokens at most: the likeliest token each time."),
        ({"num_beams": 4}, "the best of 4 beams."),
        ({"do_sample": True, "top_p": 0.5}, "drawn at random (top_p 0.5, top_k 50, temperature 0.95)."),
    ],
)
def test_how_the_answers_were_generated_is_told(flags, words, adapter, tmp_path):
    given = json.loads((adapter / "provenance.json").read_text())["flags"]
    card = build_card(copy_of(adapter, tmp_path / "folder", flags=given | flags))
    assert words in section(card, "Scores")


def with_answers(adapter: Path, folder: Path, answers: list[str]) -> list[dict[str, float]]:
    """Gives the folder these answers with their scores, as a run would have; returns the scores of each."""
    copy_of(adapter, folder, scores={})
    reference = "这条裤子是白色的，很好看"
    rows = [{"prompt": answer, "labels": reference, "predict": answer} for answer in answers]
    (folder / "generated_predictions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    scores = {"metric_protocol": "thudm", **compute_scores(answers, [reference] * len(answers), "thudm")}
    results = {f"predict_{name}": value for name, value in scores.items()}
    results["weights_sha256"] = digest_weights(folder)
    (folder / "predict_results.json").write_text(json.dumps(results), encoding="utf-8")
    return [score_pair(answer, reference, "thudm") for answer in answers]


ANSWERS = ["这条裤子是白色的，很好看", "裤子白色", "好看", "", "这条裙子是黑色的"]


def test_the_interval_is_that_of_a_direct_recomputation(adapter, tmp_path):
    scored = with_answers(adapter, tmp_path / "folder", ANSWERS)
    generator = np.random.RandomState(0)
    draws = [generator.randint(0, 5, 5) for _ in range(2000)]
    shown = score_table(build_card(tmp_path / "folder"))
    for name, title in (("rouge-1", "ROUGE-1"), ("bleu-4", "BLEU-4"), ("exact_match", "exact match, %")):
        means = sorted(sum(scored[row][name] for row in draw) / 5 for draw in draws)
        low, high = (np.percentile(means, share) for share in (2.5, 97.5))
        assert low < statistics.fmean(row[name] for row in scored) < high
        assert shown[title][1] == f"{low:.2f} … {high:.2f}"


def test_what_is_no_mean_over_examples_has_no_interval(adapter, tmp_path):
    with_answers(adapter, tmp_path / "folder", ANSWERS)
    card = build_card(tmp_path / "folder")
    assert score_table(card)["empty answers"] == ["1", "–"]
    (validation,) = [rows for rows in tables(card) if ["loss, nats per token"] in [row[:1] for row in rows]]
    assert {len(row) for row in validation} == {2}


def test_a_score_that_all_examples_share_has_no_interval(adapter, tmp_path):
    with_answers(adapter, tmp_path / "folder", 5 * ["裤子"])
    assert {len(cells) for cells in score_table(build_card(tmp_path / "folder")).values()} == {1}


def test_answers_of_another_run_give_no_interval(adapter, tmp_path, caplog):
    with_answers(adapter, tmp_path / "folder", ANSWERS)
    results = json.loads((tmp_path / "folder" / "predict_results.json").read_text()) | {"predict_rouge-1": 99.0}
    (tmp_path / "folder" / "predict_results.json").write_text(json.dumps(results))
    shown = score_table(build_card(tmp_path / "folder"))
    assert shown["ROUGE-1"] == ["99.00"] and {len(cells) for cells in shown.values()} == {1}
    assert "generated_predictions.jsonl is not of the run of the scores" in caplog.text


def test_of_several_validation_sets_each_has_its_row_and_its_table(adapter, tmp_path):
    data = {f"validation_{name}": {"file": f"{name}.json", "rows": 3, "sha256": "1" * 64} for name in ("easy", "hard")}
    folder = copy_of(adapter, tmp_path / "folder", data=data)
    results = {"eval_easy_loss": 1.0, "eval_hard_loss": 2.5, "weights_sha256": digest_weights(folder)}
    results |= {"eval_loss": 1.75, "eval_hard_call_exact_match": 25.0, "eval_hard_call_valid": 50.0}
    (folder / "all_results.json").write_text(json.dumps(results))
    card = build_card(folder)
    assert "On the validation set:" in card
    assert "| rows whose calls can be read, % | 50.00 |" in card and "| 25.00 |" in build_card(folder, language="zh")
    assert f"| validation `hard` | `hard.json` | 3 | `{'1' * 64}` |" in card
    assert "On the validation set `easy` (`easy.json`), 3 examples:" in card
    results = [one for one in ModelCard(card).data.eval_results if one.metric_type == "loss"]
    assert {one.dataset_split: one.metric_value for one in results} == {"validation_easy": 1.0, "validation_hard": 2.5}


# Curves, hardware, limits


def test_the_picture_is_linked_where_there_is_one(adapter, untested):
    assert "](training_curves.png)" in section(build_card(adapter), "Curves")
    assert "There is no picture" in section(build_card(untested, language="en"), "Curves")


def test_hardware_time_memory_and_versions_are_told(adapter):
    record = json.loads((adapter / "provenance.json").read_text())
    (shown,) = [dict(rows[1:]) for rows in tables("\n---\n" + section(build_card(adapter), "Hardware and time"))]
    assert shown["device"] == record["hardware"]["device"] and shown["processes"] == "1"
    assert shown["precision of the base"] == "float32" and shown["chosen"] == record["hardware"]["dtype_reason"]
    assert shown["training, seconds"] == f"{record['measured']['seconds']['train']:,.1f}"
    assert shown["peak resident memory"] == _size(record["measured"]["peak_memory"]["resident_bytes"])
    assert f"peft {record['versions']['peft']}" in shown["versions"]


@pytest.mark.parametrize("has_it", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize(("dtype", "kind"), [("auto", "cpu"), ("auto", "cuda"), ("bfloat16", "cpu")])
def test_why_this_precision_was_chosen_is_told_in_both_languages(
    has_it, stored, dtype, kind, adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr("glm_peft.models.loading.has_fast_bfloat16", lambda: has_it)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_it)
    _, reason = choose_dtype(dtype, torch.device(kind), stored)
    folder = copy_of(adapter, tmp_path / "folder", hardware={"dtype_reason": reason})
    told, told_in_chinese = (build_card(folder, language=language) for language in ("en", "zh"))
    assert f"| chosen | {reason} |" in told
    assert "| 选择依据 | " in told_in_chinese and reason not in told_in_chinese


def test_the_limits_of_a_prefix_are_told(adapter):
    told = section(build_card(adapter), "Limits")
    for words in ("cannot be merged", "vLLM does not serve it", "prompts were cut to 64 tokens and answers to 32"):
        assert words in told
    assert "rows in Chinese" in told


def test_what_only_trained_has_no_empty_tables_and_says_what_is_not_known(untested):
    for language in LANGUAGES:
        assert all(len(rows) > 1 for rows in tables(build_card(untested, language=language)))
    card = build_card(untested, language="en")
    assert "nothing was evaluated" in section(card, "Scores") and "Loss in training" in section(card, "Scores")
    assert "model-index" not in card


# Other folders


def test_of_an_adapter_of_stock_peft_little_is_known_and_that_is_said(tmp_path):
    PrefixTuningConfig(
        base_model_name_or_path="zai-org/GLM-4-9B-0414", num_virtual_tokens=8, task_type="CAUSAL_LM"
    ).save_pretrained(tmp_path)
    card = build_card(tmp_path)
    assert metadata_of(card)["base_model"] == "zai-org/GLM-4-9B-0414"
    assert "A P-Tuning v2 prefix of 8 virtual tokens for `zai-org/GLM-4-9B-0414`" in card
    for words in (
        "How it was trained is not recorded",
        "The data are not recorded",
        "Hardware and time are not recorded",
    ):
        assert words in card
    assert list(tables(card)) == [] and len(blocks(card, "python")) == 2


@pytest.mark.parametrize(
    "record",
    [
        [],
        {},
        {"base": 3},
        {"data": {"train": 3, "test": {"rows": "x", "sha256": 3}}, "scores": []},
        {"base": {"config_sha256": 3, "licence": "x"}, "hardware": {"processes": "x"}, "recipe": {"seed": []}},
        {"measured": {"seconds": {"train": "x"}, "peak_memory": 3}, "languages": 3, "flags": {"num_beams": "x"}},
    ],
)
def test_a_record_of_other_things_gives_a_card_still(record, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "folder")
    (tmp_path / "folder" / "provenance.json").write_text(json.dumps(record))
    assert "## Limits" in build_card(tmp_path / "folder")


def test_an_adapter_that_names_no_base_gets_none(tmp_path):
    PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    card = build_card(tmp_path)
    assert "Which base it belongs to is not recorded." in card and "path/to/base" in card
    assert Path.cwd().name not in card.replace("glm_peft", "")


def test_wrong_folders_ids_and_languages_are_told(adapter, tmp_path):
    with pytest.raises(UserError, match=r"has neither adapter_config.json nor config.json"):
        build_card(tmp_path)
    for name in ("/home/somebody/base", "chatglm3-6b", "a/b/c"):
        with pytest.raises(UserError, match="is no id on the Hub: give it as OWNER/NAME"):
            build_card(adapter, name)
    with pytest.raises(UserError, match="--card_language de is not known: give one of en, zh."):
        build_card(adapter, language="de")


def test_hub_ids_are_told_from_paths():
    assert is_hub_id("THUDM/chatglm3-6b") and is_hub_id("zai-org/GLM-4-9B-0414")
    assert not any(map(is_hub_id, ("chatglm3", "/a/b", "../a", "./a", "a/b/c", "~/a", "a\\b", "")))


# Templates


_compile = cache(partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """A variable of a template that no fact fills in is an error in every test."""
    monkeypatch.setattr(jinja2, "Template", _compile)


def test_both_languages_say_the_same_things():
    trees = [jinja2.Environment().parse(file.read_text(encoding="utf-8")) for file in TEMPLATES.values()]
    english, chinese = (jinja2.meta.find_undeclared_variables(tree) for tree in trees)
    assert english == chinese
    conditions = [[type(node.test) for node in tree.find_all(jinja2.nodes.If)] for tree in trees]
    assert conditions[0] == conditions[1]


HOSTILE = "{{ 7 * 7 }} {% raw %} {# x #}\n---\nlicense: mit\n```\n| # `${x}`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_in_the_facts_is_run_or_breaks_the_card(language, adapter, tmp_path):
    data = {"dataset": HOSTILE, "config": HOSTILE, "rows": 5, "rows_sha256": HOSTILE}
    base = {"name": HOSTILE, "revision": HOSTILE, "config_sha256": HOSTILE, "licence": {"license": HOSTILE}}
    told = {"recipe": {HOSTILE: HOSTILE}, "hardware": {"device": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    told |= {"continued_from": {"name": HOSTILE}, "languages": [HOSTILE], "chat_format": HOSTILE}
    flags = {"do_train": True, "source_prefix": HOSTILE, "chat_format": HOSTILE}
    splits = {"train": data, "test": data}
    folder = copy_of(adapter, tmp_path / "folder", data=splits, base=base, flags=flags, **told)
    card = build_card(folder, language=language)

    def shape(text: str) -> list[str]:
        kinds = ("heading_open", "fence", "table_open", "hr", "html_block")
        return [token.type for token in tokens_of(text) if token.type in kinds]

    assert shape(card) == shape(build_card(adapter, language=language))
    assert "{{ 7 \\* 7 }}" in body_of(card) and "49" not in card.split("## ")[0]
    assert metadata_of(card)["license"] == " ".join(HOSTILE.lower().splitlines())
    for code in blocks(card, "python"):
        compile(code, "card", "exec")
    assert shlex.quote(HOSTILE) in blocks(card, "bash")[1]


# Languages of the rows


@pytest.mark.parametrize(
    "text, expected",
    [
        ("今天天气很好，我们去公园散步。", ["zh"]),
        ("類型#褲*顏色#白色", ["zh"]),
        ("类型#裤*材质#A-line skirt", ["zh"]),
        ("The weather is nice and we walk to the park.", []),
        ("今日は天気がいいですね、公園に行きましょう。", []),
        ("1 + 1 = 2", []),
        ("", []),
    ],
)
def test_chinese_is_told_by_the_share_of_its_characters(text, expected):
    other = [Conversation([{"role": "user", "content": "很好"}], "row 1", False)]
    rows = [Conversation([{"role": "user", "content": text}], "row 1", False)]
    assert find_languages({"train": rows, "test": other}) == expected
    assert find_languages({}) == []
