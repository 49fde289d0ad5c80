"""
Has a command of Python run by a server of warm starts, and is for its parent that command; see warm_starts.py.

It is run without site-packages and imports next to nothing, as that is the point of it. What it cannot hand over it
runs itself, in a fresh interpreter.
"""

import contextlib
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Libraries decide by these what they are while they are imported, and Python while it starts.
READ_BY_HUGGING_FACE = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "BNB_")
READ_BY_INTEL_OPENMP = ("KMP_",)  # which accelerate sets for CPUs, with or without it
READ_AT_IMPORT = ("OMP_", "MKL_", "ATEN_", "ONEDNN_", "DNNL_")
READ_AT_IMPORT += ("LANG", "LC_", "PYTHONUTF8", "PYTHONWARN", "PYTHONHASH", "PYTHONFAULT", "MPL", "LD_")


def main() -> None:
    """`warm_client.py EXECUTABLE PYTHON SOCKET [words as after python]`, where the first is this very command."""
    executable, python, path, *words = sys.argv[1:]
    job = parse_words(words)
    connection = socket.socket(socket.AF_UNIX)
    if job is None or os.isatty(1) or os.isatty(2):
        os.execv(python, [python, *words])
    connection.connect(path)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until it is known to whom they go
    job |= {"folder": os.getcwd(), "environment": dict(os.environ), "executable": executable}
    job["orig_argv"] = [python, *words]
    job["ignored"] = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    os.umask(mask := os.umask(0))
    payload = json.dumps(job | {"umask": mask}).encode()
    socket.send_fds(connection, [len(payload).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(payload)
    answers = connection.makefile()
    pid = int(answers.readline())
    if not pid:  # another environment than the server's
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.execv(python, [python, *words])
    follow(pid, answers)


def parse_words(words: list[str]) -> "dict[str, object] | None":
    """What is to be run, or None where an option is not known here."""
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    kind = {"-m": "module", "-c": "code"}.get(words[0] if words else "-", "script")
    if kind == "script" and (not words or words[0].startswith("-")):
        return None
    argv = words if kind == "script" else words[1:]
    return {"kind": kind, "argv": argv, "unbuffered": unbuffered} if argv else None


def follow(pid: int, answers: "socket.SocketIO") -> None:
    """Hand signals on to the process, and end as it does."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = os.waitstatus_to_exitcode(int(answers.readline() or signal.SIGKILL))
    if status < 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    os._exit(status)


if __name__ == "__main__":
    main()
