"""The ground plan: which rooms there are, and that none imports from one above it."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import glm_peft

ROOT = Path(glm_peft.__file__).parent
COMMANDS = {"train", "predict", "doctor", "convert", "inspect_adapter", "search", "push"}


def test_rooms_import_downward_only_and_in_no_circle(capsys: pytest.CaptureFixture):
    code = lint_imports(config_filename=str(ROOT.parent / "setup.cfg"), no_cache=True)
    assert code == 0, capsys.readouterr().out
    assert "2 kept, 0 broken" in capsys.readouterr().out


def test_beside_the_rooms_stand_the_commands_and_what_has_a_fixed_name():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == COMMANDS | {"__init__", "data", "metrics", "errors"}


def test_every_room_says_in_one_sentence_what_it_is_for():
    for package in ROOT.rglob("__init__.py"):
        text = package.read_text(encoding="utf-8")
        assert text.startswith('"""') and "TODO" not in text, package
