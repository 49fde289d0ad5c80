"""
Processes that need not import torch, transformers and peft anew, which takes them seconds; no test itself.

`warm_python()` is a program that takes the words of `python`, with which a script, a module or a piece of code runs in
a process that was forked from one that has these libraries: a process of its own, with its own files, folder,
environment, arguments, signals and exit code. Where something is decided while modules are imported or while Python
starts, by an option or a variable, a fresh interpreter is started instead; what a user types is tested at least once
with `sys.executable` beside.
"""

import atexit
import functools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
PROJECT = TESTS.parent
# As it is before any test changes it.
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


NAMES = ("glm_peft", "libraries", "torch")
"""What has been imported, each the one before it but less."""
VARIABLE = "WARM_PROGRAMS"
"""Names the folder of the programs where the workers of xdist share them, as a server takes ten seconds to start."""


@functools.cache
def start_server() -> Path:
    """The folder of programs, by `NAMES`, whose processes have imported that; they serve until the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="warm_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listeners = [_listen(folder / f"{name}.socket") for name in NAMES]
    files = [listener.fileno() for listener in listeners]
    command = [sys.executable, str(TESTS / "warm_server.py"), *map(str, files)]
    # Pipes, as the streams of its processes are made for these; while the first is open, it serves.
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    start_server.server = subprocess.Popen(command, env=ENVIRONMENT, pass_fds=files, start_new_session=True, **streams)
    for name, listener in zip(NAMES, listeners, strict=True):
        listener.close()
        program = folder / name
        words = [program, sys.executable, folder / f"{name}.socket"]
        command = shlex.join([sys.executable, "-IS", str(TESTS / "warm_client.py"), *map(str, words)])
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        program.chmod(0o700)
    return folder


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def warm_python(knows: str = "glm_peft") -> str:
    """
    Return the program; where processes cannot be forked in this way, the interpreter itself.

    Args:
        knows: what is imported: what the commands of glm_peft need; the libraries alone, as where a test is about a
            process that knows nothing of glm_peft; or torch without transformers and its kin, as where a test is about
            what these decide while they are imported, such as where the Hub is.
    """
    if sys.platform != "linux":
        return sys.executable
    return str(Path(os.environ.get(VARIABLE) or start_server(), knows))
