"""The wheel works where there is no checkout: the recipes, the files for accelerate and the demo are in it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from launches import PROJECT
from warm_starts import warm_python

import glm_peft
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.recipes import find_recipes, main

SOURCES = ("glm_peft", "configs", "accelerate_configs", "examples")
INSTALL = "-m pip install -q --no-deps --no-build-isolation --no-index --no-compile --target"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of packages that has the wheel; built from a copy, as a build leaves folders beside the package."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        shutil.copytree(PROJECT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    subprocess.run([sys.executable, *INSTALL.split(), str(site), str(source)], check=True)
    return site


def type_command(site: Path, *words: str) -> subprocess.CompletedProcess:
    command = [warm_python("libraries"), "-m", "glm_peft", *words]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, encoding="utf-8")


def test_the_wheel_copies_a_recipe_that_trains_into_an_empty_folder(site, tmp_path, monkeypatch):
    expected = parse_train_arguments([str(PROJECT / "configs" / "demo.yaml")]).data
    monkeypatch.chdir(tmp_path)
    assert "`glm-peft recipes demo` puts it there" in type_command(site, "train", "configs/demo.yaml").stderr
    done = type_command(site, "recipes", "demo", "accelerate_configs/cpu.yaml")
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert (done.returncode, sorted(done.stdout.split())) == (0, written)
    model_args, data_args, _ = parse_train_arguments(["configs/demo.yaml"])
    assert data_args == expected and Path(data_args.train_file).is_file()
    assert Path(model_args.model_name_or_path, "config.json").is_file()
    command = Path("configs/demo.yaml").read_text(encoding="utf-8").splitlines()[1]
    launched = launch_command_parser().parse_args(command.split()[3:])
    assert launched.module and launched.training_script == "glm_peft.train" and Path(launched.config_file).is_file()


def test_the_wheel_has_every_recipe_and_the_version_of_the_package(site):
    files = [path.relative_to(site / "glm_peft") for path in (site / "glm_peft").glob("*configs/*.yaml")]
    assert {str(path) for path in files} == {f"{path.parent.name}/{path.name}" for path in find_recipes()}
    assert len(files) >= 14
    (distribution,) = importlib.metadata.distributions(name="glm_peft", path=[str(site)])
    assert distribution.version == glm_peft.__version__


def test_recipes_are_listed_copied_once_and_never_written_over(tmp_path, monkeypatch, capsys):
    main([])
    assert "adgen_chatglm3 ADGEN with ChatGLM3-6B." in [
        " ".join(line.split()) for line in capsys.readouterr().out.split("\n")
    ]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(["search_space"])
    own = tmp_path / "configs" / "search_space.yaml"
    own.write_text("mine")
    for name, said in {
        "search_space": "is there already and is another file",
        "adgen": "the nearest is 'adgen_",
    }.items():
        with pytest.raises(SystemExit):
            main(["cpu", name])
        assert said in capsys.readouterr().err
    assert own.read_text() == "mine" and not Path("accelerate_configs").exists()
