"""`setup.cfg` says OS Independent: nothing of the package needs what only some systems have."""

import ast
import os
import subprocess
from pathlib import Path

import pytest
from warm_starts import warm_python

from glm_peft.reporting import exits

PACKAGE = Path(exits.__file__).parents[1]

_ABSENT = ["fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"]
"""Modules of Python that Windows lacks."""
_LACKING = {
    "os": "O_DIRECTORY O_NOFOLLOW chown fork getpgid geteuid getuid killpg mkfifo nice sched_getaffinity setsid uname",
    "select": "epoll kqueue poll",
    "signal": "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 alarm pause setitimer sigwait",
    "time": "tzset",
}
"""Names that a module of Python lacks on Windows."""

_IMPORT_ALL = """
import builtins, importlib, pkgutil, sys, traceback

whole = builtins.__import__

def without(name, globals=None, *args, **kwargs):
    if name in sys.argv[1:] and str((globals or {}).get("__name__")).startswith("glm_peft"):
        raise ModuleNotFoundError(f"{globals['__name__']} needs {name}")
    return whole(name, globals, *args, **kwargs)

builtins.__import__ = without
import glm_peft
for module in pkgutil.walk_packages(glm_peft.__path__, "glm_peft."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(error)
"""


def test_every_module_is_imported_where_the_modules_of_unix_are_not_to_be_had():
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [warm_python("libraries"), "-c", _IMPORT_ALL, *_ABSENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def lacks(node: ast.AST) -> bool:
    """Whether it is such as `select.poll`, which some systems lack."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return False
    return node.attr in _LACKING.get(node.value.id, "").split()


def test_no_name_is_used_that_some_systems_lack():
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    used = [
        f"{file.name}:{ast.unparse(node)}" for file, tree in trees.items() for node in filter(lacks, ast.walk(tree))
    ]
    assert used == []


@pytest.fixture
def pipe() -> tuple[int, object]:
    """A pipe: its end to read from, and a stream into the other."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream


def test_a_pipe_has_a_reader_until_the_other_end_is_closed(pipe, tmp_path):
    reader, stream = pipe
    assert exits._has_reader(stream)
    stream.write("read by nobody yet")
    stream.flush()
    assert exits._has_reader(stream)
    os.close(reader)
    assert not exits._has_reader(stream)
    with (tmp_path / "file").open("w") as file:
        assert exits._has_reader(file)


def test_where_pipes_cannot_be_asked_the_one_that_broke_is_taken_for_that_of_a_reader(pipe, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError("10038: an operation was attempted on something that is not a socket")

    monkeypatch.setattr(exits.select, "select", refuse)
    os.close(pipe[0])
    assert not exits._has_reader(pipe[1])
