"""docs/trainer.md: every test that it names exists, and every flag parses in the way in which it is written."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from glm_peft.arguments.former_options import REFUSED
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.errors import UserError

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
NEEDED = ["--model_name_or_path", "base", "--output_dir", "out", "--do_train", "--train_file", "train.json"]
CAPABILITIES = (  # of the Trainer, each a word of some row
    "data collator, removed by its signature, random order, order of the file, grouped by length, workers, "
    "optimizers, schedules, gradient accumulation, label smoothing, NEFTune, gradient clipping, mixed precision, "
    "torch.compile, device placement, model parallelism, callbacks, printed logs, logging levels, memory, speed, "
    "operations, full determinism, save strategies, limit and rotation, best model, resuming, skipped, early "
    "stopping, several data sets, unlabelled data, gathering and padding, hyper-parameter search, model card, "
    "pushing, jit, IPEX"
)


def rows() -> list[list[str]]:
    """Capability, command line and tests of each row of the tables."""
    lines = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| capability")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def flags() -> list[str]:
    """Each piece of a command line as it is written, but for what the text says to be refused."""
    spans = [span for _, how, _ in rows() for span in re.findall("`(--[^`]+)`", how)]
    return [span for span in dict.fromkeys(spans) if span.split()[0].removeprefix("--") not in REFUSED]


def names_of_tests() -> set[str]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "tests").rglob("test_*.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


def test_every_capability_has_a_row():
    told = " ".join(f"{capability} {how}" for capability, how, _ in rows())
    assert [word for word in CAPABILITIES.split(", ") if word not in told] == []


def test_every_row_names_tests_that_exist():
    known = names_of_tests()
    for capability, _, tests in rows():
        named = re.findall("`(.+?)`", tests)
        assert named, capability
        assert set(named) <= known, capability


def test_every_test_of_these_capabilities_is_named():
    for file in ("test_trainer_steps.py", "test_trainer_control.py"):
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}
        assert tests - set(re.findall(r"`(test_\w+)`", TEXT)) <= {"test_large_numbers_are_told_by_their_power_of_ten"}


@pytest.mark.parametrize("written", flags())
def test_flags_parse_as_they_are_written(written):
    words = written.split()  # not as a shell would, so that JSON keeps its quotation marks
    parsed = parse_train_arguments([*NEEDED, *words])
    for name in re.findall(r"--(\w+)", written):
        assert any(hasattr(arguments, name) for arguments in parsed), name


def test_what_is_said_to_be_refused_is():
    for words, sentence in (("--jit_mode_eval", "--torch_compile"), ("--use_ipex", "leave it out")):
        with pytest.raises(UserError, match=sentence):
            parse_train_arguments([*NEEDED, words])


def test_the_command_evaluates_both_sets():
    (command,) = re.findall("^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    _, data_args, training_args = parse_train_arguments(words[words.index("glm_peft/train.py") + 1 :])
    assert data_args.validation_file == "short=my/short.json,long=my/long.json"
    assert training_args.metric_for_best_model == "long_loss"
