"""The ground plan: which rooms there are, and that none imports from one above it."""

import subprocess
import sys
from pathlib import Path

from draw_rooms import PICTURE, draw, read_imports, read_rooms

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT / "glm_peft"
COMMANDS = {"chat", "train", "predict", "doctor", "convert", "inspect_adapter", "search", "push"}
COMMANDS |= {"serve", "web", "distil", "recipes"}
# In a process of its own, as it sets up the log of the whole process.
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports('setup.cfg', no_cache=True))"


def test_rooms_import_downward_only_and_in_no_circle():
    done = subprocess.run([sys.executable, "-c", LINT], cwd=PROJECT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
    assert "Contracts: 2 kept, 0 broken." in done.stdout


def test_beside_the_rooms_stand_the_commands_and_what_has_a_fixed_name():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == COMMANDS | {"__init__", "__main__", "data", "metrics", "errors"}


def test_every_room_says_in_one_sentence_what_it_is_for():
    for package in ROOT.rglob("__init__.py"):
        assert package.read_text(encoding="utf-8").startswith('"""'), package


def test_the_picture_of_the_rooms_is_that_of_the_contract_and_the_imports():
    layers = read_rooms()
    imports = read_imports(layers)
    order = [name for layer in layers for name in (["commands"] if "train" in layer else layer)]
    assert {("adapters", "models"), ("commands", "errors")} <= imports
    assert all(order.index(importing) < order.index(imported) for importing, imported in imports)
    assert PICTURE.read_text(encoding="utf-8") == draw(layers, imports), "type: python scripts/draw_rooms.py"
