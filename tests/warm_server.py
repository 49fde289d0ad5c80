"""
Runs commands of Python in processes that have the libraries imported already; see warm_starts.py.

One process imports what is slow to import and forks for every command. It runs nothing itself: no thread, no pool of
OpenMP and no random number of torch has been made when a process is forked.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.machinery
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any, NoReturn

from warm_client import FORWARDED, READ_AT_IMPORT, READ_BY_HUGGING_FACE, READ_BY_INTEL_OPENMP

PROJECT = str(Path(__file__).parents[1])
COMMANDS = ("train", "predict")
# What transformers and its kin import of others, most of which is torch's compiler.
OTHERS = ("torch", "torch._dynamo", "torch._inductor.lowering", "torch.distributed.run", "pandas", "pyarrow", "nltk")
LIBRARIES = (
    "transformers.trainer_seq2seq",
    "peft",
    "datasets",
    "accelerate.commands.launch",
    "matplotlib.backends.backend_agg",
)
ENVIRONMENT = dict(os.environ)
OWN_PATHS = len([path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path])


class Server:
    """Takes jobs at a socket; a connection is a process, and ends with it."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.read_at_import = READ_AT_IMPORT
        if "huggingface_hub" in sys.modules:
            self.read_at_import += READ_BY_HUGGING_FACE
        if "libiomp" in Path("/proc/self/maps").read_text():
            self.read_at_import += READ_BY_INTEL_OPENMP
        self.connections: dict[int, socket.socket] = {}  # by the process
        self.exits: dict[int, int] = {}  # what is readable when a process has ended, by the process

    def take_job(self) -> dict[str, Any]:
        """Serve; returns in the forked processes, with what is to be done there."""
        while True:
            readable, _, _ = select.select(
                [0, self.listener, *self.connections.values(), *self.exits.values()], [], []
            )
            for pid in [pid for pid, fd in self.exits.items() if fd in readable]:
                self._end(pid, os.waitpid(pid, 0)[1])
            for pid in [pid for pid, connection in self.connections.items() if connection in readable]:
                os.kill(pid, signal.SIGKILL)  # whoever asked for it was killed
            if 0 in readable:  # the tests have ended
                for pid in self.connections:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if self.listener in readable and (job := self._fork(self.listener.accept()[0])):
                return job

    def _end(self, pid: int, status: int) -> None:
        os.close(self.exits.pop(pid))
        _send(self.connections.pop(pid), status)

    def _fork(self, connection: socket.socket) -> dict[str, Any] | None:
        """The job in the new process, and None in this one."""
        length, files, _, _ = socket.recv_fds(connection, 4, 3)
        with connection.makefile("rb") as stream:
            words = stream.read(int.from_bytes(length, "big"))
        job = json.loads(words) if words.endswith(b"}") else {}  # otherwise whoever asked for it was killed
        pid = os.fork() if self._has_this_environment(job.get("environment", {})) else -1
        if pid == 0:
            for number, file in enumerate(files):
                os.dup2(file, number)
            for resource in (connection, self.listener, *self.connections.values()):
                resource.close()
            for file in (*files, *self.exits.values()):
                os.close(file)
            return job
        for file in files:
            os.close(file)
        if pid > 0:
            self.connections[pid], self.exits[pid] = connection, os.pidfd_open(pid)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(f"{max(pid, 0)}\n".encode())
        return None

    def _has_this_environment(self, other: dict[str, str]) -> bool:
        """Where what is read while modules are imported is the same."""
        own, found = (
            {name: value for name, value in variables.items() if name.startswith(self.read_at_import)}
            for variables in (ENVIRONMENT, other)
        )
        return own == found


def _send(connection: socket.socket, number: int) -> None:
    with connection, contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{number}\n".encode())


def import_others() -> None:
    """What takes longest, and reads none of the variables of the Hub."""
    for name in OTHERS:
        importlib.import_module(name)


def import_libraries() -> None:
    """What is left of what takes long."""
    for name in LIBRARIES:
        importlib.import_module(name)
    del sys.modules["accelerate.commands.launch"]  # it is run


def import_commands() -> None:
    """What they need; the commands themselves are left to whoever runs them."""
    package = importlib.import_module("glm_peft")
    for name in COMMANDS:
        importlib.import_module(f"glm_peft.{name}")
        del sys.modules[f"glm_peft.{name}"]
        delattr(package, name)
    sys.modules["jieba"].initialize()  # reads its dictionary, as whoever scores answers


def become(job: dict[str, Any]) -> None:
    """Make this process as a fresh one is."""
    import numpy
    import torch

    os.setsid()
    os.chdir(job["folder"])
    os.umask(job["umask"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number in FORWARDED:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in job["ignored"] else usual)
    random.seed()
    numpy.random.seed()
    torch.default_generator.seed()
    sys.argv, sys.orig_argv, sys.executable = job["argv"], job["orig_argv"], job["executable"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=os.environ.get("PYTHONIOENCODING"), write_through=job["unbuffered"])
    first = {"script": str(Path(sys.argv[0]).resolve().parent), "module": os.getcwd(), "code": ""}[job["kind"]]
    further = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *further, *sys.path[1 + OWN_PATHS :]]


def run(kind: str, argv: list[str]) -> None:
    """As `python`, `python -m` and `python -c` do."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if kind == "module":
        runpy._run_module_as_main(argv[0])
        return
    if kind == "code":
        code, sys.argv = argv[0], ["-c", *argv[1:]]
        exec(compile(code, "<string>", "exec"), main.__dict__)
        return
    main.__file__ = argv[0]
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", argv[0])
    exec(main.__loader__.get_code("__main__"), main.__dict__)


def main() -> dict[str, Any]:
    """`warm_server.py FILE…`: sockets of those that know the most, less, and the least; returns in their processes."""
    listeners = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    for import_more in (import_others, import_libraries, import_commands):
        import_more()
        listener = listeners.pop()
        if not listeners or not os.fork():
            break
        listener.close()
    for other in listeners:
        other.close()
    gc.collect()
    gc.freeze()  # pages that nothing writes to are shared
    return Server(listener).take_job()


def end(error: BaseException | None) -> NoReturn:
    """As Python ends, but that it takes no module apart: that is half a second of copying shared pages."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else bool(error.code)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    elif error:
        code, trace = 1, error.__traceback__
        while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    job = main()
    become(job)
    error = None
    try:
        run(job["kind"], job["argv"])
    except BaseException as raised:
        error = raised
    end(error)
