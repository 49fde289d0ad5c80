"""The documents hold: links resolve, commands and flags exist, examples run, quoted sentences are the toolkit's."""

import ast
import builtins
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import chat_turns
import compare_demo
import cost_growth
import distil_cost
import distil_curve
import forgetting_reading
import forgetting_table
import gpu_check
import pytest
import real_size
import serving_benchmark
import soak_server
import torch
import train_demo_model
import train_reading_model
from accelerate.commands.launch import launch_command_parser
from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from scaling_table import Assumptions
from tiny_options import ModelOptions
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4Config,
    GlmConfig,
    HfArgumentParser,
    PreTrainedConfig,
    Seq2SeqTrainingArguments,
)

from glm_peft import predict, train
from glm_peft.adapters.files import read_flat_prefix
from glm_peft.adapters.loading import load_adapter
from glm_peft.arguments.chat import ChatArguments, parse_chat_arguments
from glm_peft.arguments.command_line import names_of_fields
from glm_peft.arguments.conversion import parse_convert_arguments
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.distil import DistilArguments, parse_distil_arguments
from glm_peft.arguments.doctor import parse_doctor_arguments
from glm_peft.arguments.former_options import IGNORED, REFUSED, RENAMED
from glm_peft.arguments.inspection import parse_inspect_arguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import PredictArguments, parse_predict_arguments
from glm_peft.arguments.push import PushArguments, parse_push_arguments
from glm_peft.arguments.recipes import parse_recipes_arguments
from glm_peft.arguments.search import SearchArguments, parse_search_arguments
from glm_peft.arguments.serve import ServeArguments, parse_serve_arguments
from glm_peft.arguments.sources import read_train_sources
from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.arguments.training_defaults import TrainingDefaults
from glm_peft.arguments.web import WebArguments, parse_web_arguments
from glm_peft.errors import UserError
from glm_peft.examination.doctor_report import GB
from glm_peft.examination.memory_estimate import BaseSize, Settings, estimate_memory, measure_base
from glm_peft.models import ChatGLMConfig
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.training.trainer import PrefixTrainer

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")
DOCUMENTS = [*READMES, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"bash", "python", "json", "jsonl", "csv", "text", "yaml"}

UNCHECKED_COMMANDS = {
    "pip install": "it installs from a registry; `make test` installs the same way",
    "pip download": "it asks a registry",
    "zip -q": "it works on what that fetched",
}
OTHER_FLAGS = {
    "--base": "of glm_peft.convert",
    "--verify": "of glm_peft.convert",
    "--prune": "of glm_peft.inspect_adapter",
    "--tokenizer_dir": "of scripts/make_tiny_model.py",
    "--config_file": "accelerate's",
    "--quiet": "accelerate's",
    "--num_processes": "accelerate's",
    "--num_machines": "accelerate's",
    "--machine_rank": "accelerate's",
    "--main_process_ip": "accelerate's",
    "--help": "argparse's",
    "--help_all": "of every command of training",
    "--output_dir": "of every command",
    "--generation": "of scripts/make_tiny_model.py",
    "--hidden_size": "of scripts/make_tiny_model.py",
    "--num_layers": "of scripts/make_tiny_model.py",
    "--lines": "of scripts/gpu_check.py",
    "--small": "of scripts/gpu_check.py",
}
SENTENCES_OF_LIBRARIES = {"--load_best_model_at_end requires the save and eval strategy to match, …": "transformers'"}
RECIPES = {
    "adgen_chatglm": "chatglm",
    "adgen_chatglm2": "chatglm2",
    "adgen_chatglm3": "chatglm3",
    "adgen_glm4": "glm4",
    "adgen_glm4_0414": "glm4_0414",
    "adgen_glm4_lora": "glm4",
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", text_of(document), re.MULTILINE | re.DOTALL)


def blocks_of(*languages: str, documents: list[str] = DOCUMENTS) -> list:
    """Parameters: every block in one of the languages, with its document and number as its id."""
    found = [(document, *block) for document in documents for block in blocks(document) if block[0] in languages]
    return [pytest.param(*block[1:], id=f"{block[0]}-{number}") for number, block in enumerate(found)]


def commands() -> list:
    """Parameters: the words of every command in a block of bash."""
    found: dict[tuple[str, ...], str] = {}  # once each: the pages in Chinese have those of the English ones
    for document in DOCUMENTS:
        for language, content in blocks(document):
            if language == "bash":
                lines = content.replace("\\\n", " ").splitlines()
                for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
                    found.setdefault(tuple(words), document)
    return [
        pytest.param(list(words), id=f"{document}-{number}") for number, (words, document) in enumerate(found.items())
    ]


def rows_of_table(document: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = text_of(document).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# Links


def anchors(document: Path) -> list[str]:
    """The anchors that GitHub gives the headings, in their order."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_inside_the_repository_resolves(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(document))
    broken = []
    for target in (target for target in targets if not re.match(r"\w+:", target)):
        name, _, anchor = target.partition("#")
        file = (ROOT / document).parent / name if name else ROOT / document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_readme_is_short_and_both_link_every_document():
    assert len(text_of("README.md").splitlines()) <= 200
    for readme, folder in zip(READMES, ("docs", "docs/zh"), strict=True):
        pages = [name for name in DOCUMENTS if os.path.dirname(name) == folder]
        assert [name for name in pages if f"({name})" not in text_of(readme)] == []


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if document not in READMES])
def test_contents_name_every_section(document):
    listed = re.findall(r"^- \[(.+)\]\(#", text_of(document), re.MULTILINE)
    assert not listed or listed == re.findall(r"^## (.+)$", text_of(document), re.MULTILINE)


# Commands and flags


def parse_compare_demo(words: list[str]) -> None:
    arguments, flags = compare_demo.parse_arguments(words)
    parse_train_arguments([arguments.recipe, *flags])


MODULES = {
    "glm_peft.train": parse_train_arguments,
    "glm_peft.predict": parse_predict_arguments,
    "glm_peft.doctor": parse_doctor_arguments,
    "glm_peft.chat": parse_chat_arguments,
    "glm_peft.serve": parse_serve_arguments,
    "glm_peft.web": parse_web_arguments,
    "glm_peft.distil": parse_distil_arguments,
    "glm_peft.search": parse_search_arguments,
    "glm_peft.push": parse_push_arguments,
    "glm_peft.recipes": parse_recipes_arguments,
    "glm_peft.convert": parse_convert_arguments,
    "glm_peft.inspect_adapter": parse_inspect_arguments,
}
SCRIPTS = {
    "scripts/soak_server.py": soak_server.parse_arguments,
    "scripts/distil_cost.py": distil_cost.parse_arguments,
    "scripts/distil_curve.py": distil_curve.parse_arguments,
    "scripts/train_reading_model.py": train_reading_model.parse_arguments,
    "scripts/serving_benchmark.py": serving_benchmark.parse_arguments,
    "scripts/scaling_table.py": HfArgumentParser(Assumptions).parse_args_into_dataclasses,
    "scripts/real_size.py": real_size.parse_arguments,
    "scripts/benchmark.py": benchmark.parse_arguments,
    "scripts/cost_growth.py": cost_growth.parse_arguments,
    "scripts/chat_turns.py": chat_turns.parse_arguments,
    "scripts/compare_demo.py": parse_compare_demo,
    "scripts/forgetting_reading.py": forgetting_reading.parse_arguments,
    "scripts/forgetting_table.py": forgetting_table.parse_arguments,
    "scripts/train_demo_model.py": train_demo_model.parse_arguments,
    "scripts/make_tiny_model.py": HfArgumentParser(ModelOptions).parse_args_into_dataclasses,
}


@pytest.mark.parametrize("words", commands())
def test_every_command_is_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if " ".join(words[:2]) in UNCHECKED_COMMANDS:
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", text_of("Makefile"), re.MULTILINE)
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert Path(launched.config_file).is_file()
        assert launched.quiet  # or accelerate's traceback follows the sentence
        assert bool(launched.module) == (launched.training_script in MODULES)
        parse = {**MODULES, "glm_peft/train.py": parse_train_arguments}
        parse[launched.training_script](launched.training_script_args)
    elif words[:2] == ["python", "-m"]:
        words = words[: words.index("<")] if "<" in words else words
        MODULES[words[2]](words[3:])
    elif words[:2] == ["bash", "scripts/gpu_check.sh"]:
        gpu_check.parse_arguments(words[2:])
    elif words != ["python", "scripts/draw_rooms.py"]:  # which takes no words
        assert words[0] == "python"
        SCRIPTS[words[1]](words[2:])


@pytest.mark.parametrize(("language", "text"), blocks_of("yaml"))
def test_configurations_that_are_shown_are_understood(language, text, tmp_path):
    file = tmp_path / "shown.yaml"
    file.write_text(text, encoding="utf-8")
    if "document:" in text:
        assert parse_distil_arguments([str(file)])[0].document == ["handbook.md", "prices.pdf"]
    else:
        _, data_args, _ = parse_train_arguments(
            [str(file), *["--output_dir", "out", "--model_name_or_path", "base", "--do_train"]]
        )
        names = [source.name for source in read_train_sources(data_args.train_file)]
        assert names == ["chats", "facts"] if "weight:" in text else data_args.train_file == "my/train.json"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_of_kinds_that_are_looked_at_here(document):
    assert {language for language, _ in blocks(document)} <= LANGUAGES


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_and_make_target_that_is_named_exists(document):
    modules = set(re.findall(r"python -m (glm_peft\.\w+)", text_of(document)))
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()
    targets = set(re.findall(r"`make (\w+)", text_of(document)))
    assert {name for name in targets if not re.search(rf"^{name}:", text_of("Makefile"), re.MULTILINE)} == set()


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if "demo" not in document])
def test_every_flag_that_is_named_exists(document):
    """But for the demo's pages, whose flags are those of its own scripts."""
    types = (ModelArguments, DataArguments, TrainingArguments, PredictArguments, SearchArguments, PushArguments)
    types = (*types, ChatArguments, ServeArguments, WebArguments, DistilArguments)
    known = {f"--{name}" for name in (*names_of_fields(types), *IGNORED, *REFUSED, *RENAMED)} | set(OTHER_FLAGS)
    prose = re.sub(r"^(> .*|```.*?^```)$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z_0-9]+", prose)) - known == set()


def test_the_removed_flags_are_refused_with_the_advice_of_the_table():
    rows = rows_of_table("docs/migrating.md", "Flags that transformers 5 removed")
    assert len(rows) >= 9
    for old, now in rows:
        for name in re.findall(r"--(\w+)", old):
            assert all(flag in REFUSED[name] for flag in re.findall(r"--\w+|[A-Z_]{6,}", now))


def test_the_flags_that_are_said_to_be_ignored_are():
    ignored = [cells[0] for cells in rows_of_table("docs/migrating.md", "Flags") if cells[1].startswith("a warning")]
    assert {name for cell in ignored for name in re.findall(r"--(\w+)", cell)} == set(IGNORED)


WORDS_FOR_VALUES = {"not set": None, "true": True, "false": False, "5e-5": 5e-5, "10": 10, "500": 500}


def defaults_of(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields; lists as one text."""
    return {
        field.name: ", ".join(field.default_factory()) if field.default is MISSING else field.default
        for field in fields(kind)
    }


def test_the_flags_that_are_said_to_have_other_defaults_do():
    ours, theirs = defaults_of(TrainingDefaults), defaults_of(Seq2SeqTrainingArguments)
    rows = [cells[:3] for cells in rows_of_table("docs/recipes.md", "Other defaults")]
    said = {flag.strip("`-"): [WORDS_FOR_VALUES.get(word, word) for word in words] for flag, *words in rows}
    assert said == {name: [ours[name], theirs[name]] for name in said}
    assert {name for name in ours if name in theirs and ours[name] != theirs[name]} <= set(said)


def test_the_recipes_have_the_limits_and_the_dropout_of_their_table():
    for files, _, limits, dropout in rows_of_table("docs/recipes.md", "The files"):
        recipe, with_lora = re.findall(r"\[(.+?)\]", files)
        assert with_lora == recipe.replace(".yaml", "_lora.yaml") and (ROOT / with_lora).is_file()
        model_args, data_args, _ = parse_train_arguments([str(ROOT / recipe)])
        assert limits == f"{data_args.max_source_length} / {data_args.max_target_length}"
        assert float(dropout) == model_args.prefix_dropout


# The sizes of the published models; the defaults of the classes are those of ChatGLM-6B, GLM-4-9B and GLM-4-9B-0414.
SIZES = {
    "ChatGLM-6B": ("adgen_chatglm", ChatGLMConfig()),
    "ChatGLM2-6B": ("adgen_chatglm3", GlmConfig(vocab_size=65024, num_hidden_layers=28, pad_token_id=0)),
    "GLM-4-9B": ("adgen_glm4", GlmConfig()),
    "GLM-4-0414": ("adgen_glm4_0414", Glm4Config()),
}
NO_RECIPE = ["--model_name_or_path", "base", "--output_dir", "out", "--do_train", "--train_file", "train.json"]


@pytest.mark.parametrize(("readme", "heading"), [("README.md", "Which GPU"), ("README_zh.md", "需要什么显卡")])
def test_the_memory_that_is_said_is_what_the_doctor_estimates(readme, heading):
    rows = rows_of_table(readme, heading)
    assert len(rows) == 2 * len(SIZES)
    for name, longest, *cells in rows:
        recipe, config = SIZES[re.match(r"GLM-4-\d+B?|ChatGLM\d?-6B", name)[0]]
        words = [str(ROOT / "configs" / f"{recipe}.yaml")] if "ADGEN" in name else NO_RECIPE
        _, data_args, _ = parse_train_arguments(words)
        labels, tokens = data_args.max_target_length, data_args.max_source_length + data_args.max_target_length
        assert longest.split()[0] == f"{tokens:,}"
        settings, base = Settings(tokens=tokens, labels=labels), measure_base(config)
        estimates = [memory_cell(config, replace(settings, quantization_bit=bits), base) for bits in (None, 8, 4)]
        assert numbers(*cells) == pytest.approx(numbers(*estimates), abs=0.2)


def numbers(*cells: str) -> list[float]:
    return [float(number) for cell in cells for number in cell.split(" / ")]


def memory_cell(config: PreTrainedConfig, settings: Settings, base: BaseSize) -> str:
    """GB without and with activation checkpointing."""
    ways = (replace(settings, activation_checkpointing=is_on) for is_on in (False, True))
    return " / ".join(f"{estimate_memory(config, way, base).total / GB:.1f}" for way in ways)


def test_the_half_width_marks_that_are_named_are_those_of_the_published_tokenizer(reference_tokenizers):
    section = text_of("docs/migrating.md").split("\n### Chinese punctuation\n")[1]
    full, half, *others = re.findall("`(.+?)`", section)[:5]
    chatglm = AutoTokenizer.from_pretrained(reference_tokenizers / "chatglm-6b")
    read = {text: chatglm.decode(chatglm.encode(text, add_special_tokens=False)) for text in (full, *others)}
    assert read == {full: half, others[0]: others[1], others[1]: others[1], others[2]: others[2]}
    for name in ("chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"):
        tokenizer = AutoTokenizer.from_pretrained(reference_tokenizers / name)
        assert tokenizer.decode(tokenizer.encode(full, add_special_tokens=False)) == full


# Examples


@pytest.fixture
def workplace(tmp_path, tiny_model_dirs, reference_models, monkeypatch) -> dict[str, Path]:
    """A working folder with what the examples in Python name, and the small models for the names in them."""
    models = {"THUDM/chatglm3-6b": tiny_model_dirs["chatglm3"], "THUDM/chatglm2-6b": reference_models / "chatglm2-6b"}
    base = AutoModelForCausalLM.from_pretrained(models["THUDM/chatglm3-6b"])
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(base, config).save_pretrained(tmp_path / "output" / "adgen_chatglm3")
    shutil.copytree(reference_models / "chatglm2-6b" / "ptuning-prefix", tmp_path / "ptuning" / "checkpoint-3000")
    monkeypatch.chdir(tmp_path)
    models["USER/NAME"] = tmp_path / "output" / "adgen_chatglm3"
    return models


def run_example(code: str, workplace: dict[str, Path], names: dict[str, Any]) -> None:
    for name, folder in workplace.items():
        code = code.replace(name, str(folder))
    exec(compile(code, "example", "exec"), names)
    for written in re.findall(r'(?:save_pretrained|to_parquet)\("(.+?)"\)', code):
        assert Path(written).exists()


ALONE = [document for document in DOCUMENTS if document != "docs/from_python.md" and "/zh/" not in document]


@pytest.mark.parametrize(("language", "code"), blocks_of("python", documents=ALONE))
def test_examples_in_python_run(language, code, workplace):
    run_example(code, workplace, {})


def test_the_page_from_python_runs_from_its_top_to_its_end(workplace):
    shutil.copytree("output/adgen_chatglm3", "output/poet")
    names: dict[str, Any] = {}
    for language, code in blocks("docs/from_python.md"):
        assert language == "python"
        run_example(re.sub(r"\b(512|128)\b", "8", code), workplace, names)
    assert len(names["answers"]) == 3 and len(names["history"]) == 4
    assert {"adapter_model.safetensors", "prefix_encoder.safetensors"} <= set(os.listdir("output/continued"))
    own, continued = (
        read_flat_prefix(f"output/{name}", PeftConfig.from_pretrained(f"output/{name}"))
        for name in ("own_trainer", "continued")
    )
    with pytest.raises(UserError, match="give it glm_peft.TrainingArguments"):
        PrefixTrainer(names["model"], Seq2SeqTrainingArguments("output/stock", use_cpu=True))
    assert 0 < (own - continued).abs().max() < 0.01


def test_generate_cannot_do_with_a_prefix_what_the_page_says(workplace):
    tokenizer = AutoTokenizer.from_pretrained(workplace["THUDM/chatglm3-6b"])
    base, draft = (AutoModelForCausalLM.from_pretrained(workplace["THUDM/chatglm3-6b"]).eval() for _ in range(2))
    model = load_adapter(base, "output/adgen_chatglm3").eval()
    prompt = (
        get_chat_format(tokenizer)
        .encode_prompt(tokenizer, [{"role": "user", "content": "类型#上衣*颜色#白色*风格#简约"}])
        .ids
    )
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    always = {
        "prefix_allowed_tokens_fn": lambda *_: prompt[-2:-1]
    }  # so that a candidate is found, as in a longer text
    expected = model.generate(input_ids=ids, **options)
    earlier = model.generate(input_ids=ids[:, :5], max_new_tokens=1, return_dict_in_generate=True).past_key_values
    names = {"draft": draft, "earlier": earlier, "embeddings": base.get_input_embeddings()(ids)}
    for asked, seen, _ in rows_of_table("docs/from_python.md", "What generate cannot do with a prefix"):
        given = eval(f"dict({asked.strip('`')})", names) | (always if "lookup" in asked else {})
        inputs = {} if "inputs_embeds" in given else {"input_ids": ids}
        error = re.match(r"(\w+Error): (sizes of tensors)?", seen)
        if error:
            with pytest.raises(getattr(builtins, error[1]), match="(?i)sizes of tensors" if error[2] else ""):
                model.generate(**inputs, **options | given)
        else:
            answer = model.generate(**inputs, **options | given)
            assert torch.equal(answer, expected) == seen.startswith("no effect")


@pytest.mark.parametrize(("language", "rows"), blocks_of("json", "jsonl", "csv", documents=["docs/data_formats.md"]))
def test_examples_of_data_are_read(language, rows, tmp_path):
    file = tmp_path / f"rows.{language}"
    file.write_text(rows, encoding="utf-8")
    objective = "dpo" if '"rejected"' in rows else "sft"
    split = load_splits(DataArguments(train_file=str(file), objective=objective), ["train"])["train"]
    expected = {"json": rows.count("\n  {"), "jsonl": len(rows.splitlines()), "csv": len(rows.splitlines()) - 1}
    assert len(split) == expected[language] and all(conversation.answer for conversation in split)


BAD_ROWS = {"docs/data_formats.md": "Bad rows", "docs/zh/data_formats.md": "有误的数据"}


@pytest.mark.parametrize(("line", "said"), [row for table in BAD_ROWS.items() for row in rows_of_table(*table)])
def test_bad_rows_give_the_sentence_beside_them(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(line.strip("`"), encoding="utf-8")
    objective = "dpo" if '"chosen"' in line else "sft"
    with pytest.raises(UserError) as error:
        load_splits(DataArguments(train_file="rows.jsonl", objective=objective), ["train"])
    assert str(error.value) == said.split("<br>")[0]  # behind it the page in Chinese explains the sentence


def messages() -> list[tuple[re.Pattern, int]]:
    """Every string of the package, with anything where an f-string fills something in, and its fixed characters."""
    found = set()
    for file in (ROOT / "glm_peft").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        parts_of_f_strings = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
        inside = {id(part) for parts in parts_of_f_strings for part in parts}
        strings = [[node] for node in nodes if isinstance(node, ast.Constant) and id(node) not in inside]
        for parts in parts_of_f_strings + strings:
            texts = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
            pattern = "".join(".*" if text is None else re.escape(text) for text in texts)
            found.add((pattern, sum(len(text or "") for text in texts)))
    return [(re.compile(pattern), length) for pattern, length in found]


def test_quoted_errors_are_sentences_of_the_toolkit():
    sentences = re.findall(r"^> (.+)$", text_of("docs/common_errors.md"), re.MULTILINE)
    known = messages()

    def is_said(sentence: str) -> bool:
        """Whether the fixed words of one message make three tenths of it at least; names and numbers are examples."""
        return any(length >= 0.3 * len(sentence) and pattern.search(sentence) for pattern, length in known)

    assert len(sentences) >= 30
    assert [one for one in sentences if one not in SENTENCES_OF_LIBRARIES and not is_said(one)] == []


def test_the_chinese_table_of_errors_quotes_the_sentences():
    sentences = "\n".join(re.findall(r"^> (.+)$", text_of("docs/common_errors.md"), re.MULTILINE))
    quoted = [cells[0].strip("`") for cells in rows_of_table("README_zh.md", "常见报错")]
    assert len(quoted) >= 10 and [words for words in quoted if words not in sentences] == []


# What the README says of training and prediction


def type_words(module, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def stock_answer(base: Path, adapter: Path, row: dict[str, str]) -> str:
    """The greedy answer of four tokens that stock PEFT gives."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    chat_format = get_chat_format(tokenizer)
    prompt = chat_format.encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}]).ids
    ids, stops = torch.tensor([prompt]), chat_format.stop_token_ids(tokenizer)
    settings = SimpleNamespace(max_new_tokens=4, do_sample=False, eos_token_id=stops, repetition_penalty=1.0)
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **vars(settings))[0, len(prompt) :]
    kept = [id_ for id_ in generated.tolist() if id_ not in stops]
    return chat_format.clean_answer(tokenizer.decode(kept, skip_special_tokens=True))


@pytest.mark.parametrize(("recipe", "generation"), RECIPES.items())
def test_every_recipe_trains_and_predicts_and_stock_peft_answers_the_same(
    recipe, generation, tiny_model_dirs, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    base, adapter, predictions = str(tiny_model_dirs[generation]), tmp_path / "adapter", tmp_path / "predictions"
    data = ("--test_file", "examples/demo/test.json", "--max_predict_samples", "2", "--max_new_tokens", "4")
    size = "--lora_rank 2" if recipe.endswith("lora") else "--num_virtual_tokens 4"
    small = f"--quantization_bit 0 --max_steps 2 --save_steps 2 {size} --max_train_samples 4"
    words = f"--use_cpu --do_sample false {small} --train_file examples/demo/train.json --disable_tqdm true".split()
    type_words(
        train,
        monkeypatch,
        f"configs/{recipe}.yaml",
        *("--model_name_or_path", base, "--output_dir", str(adapter), *words, *data),
    )
    type_words(
        predict,
        monkeypatch,
        *("--model_name_or_path", base, "--adapter_name_or_path", str(adapter)),
        *("--output_dir", str(predictions), *data),
    )
    rows = [json.loads(line) for line in (predictions / "generated_predictions.jsonl").read_text().splitlines()]
    assert (adapter / "generated_predictions.jsonl").read_text().splitlines() == [
        json.dumps(row, ensure_ascii=False) for row in rows
    ]
    answers = [row["predict"] for row in rows]
    assert [stock_answer(Path(base), adapter, row) for row in rows] == answers
    assert any(answers) or generation == "chatglm"  # whose random weights say nothing but <sop>
    named = {
        name
        for cells in rows_of_table("docs/recipes.md", "What a run leaves")
        for name in re.findall("`(.+?)`", cells[0])
    }
    left = {re.sub(r"\d+$", "N/", path.name) for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "all_results.json"} <= left <= named
