"""docs/scaling.md: its tables are the script's, and the script's formulas hold where they can be measured."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scaling_table
import yaml
from launches import CONFIGS, TRAINING, make_rows, run_launch
from scaling_table import BACKENDS, MODELS, Assumptions, describe, memory_a_gpu, sent_bytes, speed_up

from glm_peft.examination.memory_estimate import Settings, estimate_memory, measure_base

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "scaling.md"


def test_the_tables_are_what_the_script_prints():
    assert describe(Assumptions()).rstrip() in DOCUMENT.read_text(encoding="utf-8")


def test_what_the_tables_assume_is_told():
    text, assumed = " ".join(DOCUMENT.read_text(encoding="utf-8").split()), Assumptions()
    told = [f"{assumed.tokens:,} tokens", f"{assumed.tera_flops:g} TFLOP/s", f"{assumed.hop_seconds * 1e6:.0f} µs"]
    told += [f"{value:g} GB/s" for name, value in vars(assumed).items() if name.startswith(("slow", "fast"))]
    assert [words for words in told if words not in text] == []


def commands(text: str) -> list[list[str]]:
    """The words of every launch of train.py with a recipe, in the header of a config file or in a document."""
    lines = re.sub(r"\\\n[# ]*", " ", text).splitlines()
    return [line.split() for line in lines if re.search(r"accelerate launch .*train\.py configs/", line)]


def examples_a_step(words: list[str]) -> tuple[int, int]:
    """Those of a command, and those of its recipe in one process."""
    recipe = next(word for word in words if word.startswith("configs/"))
    given = {name.removeprefix("--"): value for name, value in pairwise(words) if name.startswith("--")}
    own, alone = [
        [int(settings.get(name, 1)) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
        for settings in (read_yaml(recipe) | given, read_yaml(recipe))
    ]
    return int((read_yaml(given["config_file"]) | given)["num_processes"]) * math.prod(own), math.prod(alone)


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((TESTS.parent / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", [DOCUMENT, *sorted(CONFIGS.glob("*.yaml"))], ids=lambda file: file.name)
def test_every_command_takes_as_many_examples_in_a_step_as_its_recipe_in_one_process(file):
    found = [examples_a_step(words) for words in commands(file.read_text(encoding="utf-8"))]
    assert found
    assert [own for own, _ in found] == [alone for _, alone in found]


def test_a_step_of_ddp_exchanges_the_gradients_of_the_prefix_once_and_next_to_nothing_else(tiny_model_dirs, tmp_path):
    words = ["--model_name_or_path", str(tiny_model_dirs["chatglm3"]), *TRAINING.split(), "--max_steps", "3"]
    words += ["--train_file", str(make_rows(tmp_path / "rows.json", 24)), "--gradient_accumulation_steps", "2"]
    words += ["--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    run_launch(tmp_path / "log", TESTS / "count_bytes.py", [str(tmp_path), *words])
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"bytes_{rank}.json").read_text())
        assert facts["processes"] == 2
        assert [step.pop("all_reduce") for step in facts["steps"]] == [4 * facts["trained"]] * 3
        assert all(sum(step.values()) <= 64 for step in facts["steps"])


def test_one_gpu_sends_nothing_and_takes_the_memory_of_one_process():
    for config in MODELS.values():
        base = measure_base(config)
        expected = estimate_memory(config, Settings(), base).total
        for engine in BACKENDS:
            assert sent_bytes(1000, 1e9, engine, 1) == 0
            assert memory_a_gpu(config, Settings(), base, engine, 1) == expected
            assert speed_up(config, base, engine, 1, Assumptions(), is_fast=False) == 1


def test_bytes_are_those_of_a_ring():
    assert sent_bytes(1000, 1e9, "DDP", 2) == sent_bytes(1000, 1e9, "ZeRO-2", 2) == 4000
    assert sent_bytes(1000, 1e9, "DDP", 4) == 6000
    assert sent_bytes(1000, 1e9, "FSDP2", 4) == 6000 + 2 * 0.75e9


@pytest.mark.parametrize("engine", BACKENDS)
def test_more_gpus_never_take_more_memory_each(engine):
    config = MODELS["GLM-4-9B"]
    base = measure_base(config)
    sizes = [memory_a_gpu(config, Settings(), base, engine, gpus) for gpus in scaling_table.NUMBERS_OF_GPUS[1:]]
    assert sizes == sorted(sizes, reverse=True)


def test_slower_links_and_slower_first_bytes_cost_speed():
    config = MODELS["ChatGLM-6B"]
    base = measure_base(config)
    for engine in BACKENDS:
        usual = speed_up(config, base, engine, 16, Assumptions(), is_fast=True)
        assert speed_up(config, base, engine, 16, Assumptions(), is_fast=False) < usual < 16
        assert speed_up(config, base, engine, 16, Assumptions(hop_seconds=1e-3), is_fast=True) < usual
        assert speed_up(config, base, engine, 16, Assumptions(tokens=8192), is_fast=True) > usual
