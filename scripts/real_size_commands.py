"""Runs the commands of scripts/real_size.py, watches their memory, and tells which failed; no command itself."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT, PYTHON = Path(__file__).parents[1], sys.executable
MOST_TO_END = 60  # seconds after Ctrl-C
Figures = dict[str, Any]
Attend = Callable[[subprocess.Popen, Path, Figures], None]


def run(words: list[object], log: Path, limit: float, attend: Attend | None = None) -> Figures:
    """
    Run a Python command to its end, and watch its memory.

    Args:
        words: what follows `python`.
        log: file for what it says.
        limit: most seconds; it is killed after them.
        attend: uses it while it runs, ends it, and adds figures; `None` where it ends by itself.

    Returns:
        `allocated` and `resident`, the most bytes that it had of either, and `seconds`, or in place of these what
        `failed`.
    """
    print(time.strftime("%H:%M:%S"), f"{log.stem}: see {log}", file=sys.stderr, flush=True)
    figures, start = {"allocated": 0, "resident": 0}, time.perf_counter()
    with started(words, log, limit) as process:
        threading.Thread(target=watch, args=(process.pid, figures), daemon=True).start()
        problem = see_to_end(process, log, figures, attend)
    seconds = time.perf_counter() - start
    if problem is None:
        return figures | {"seconds": seconds}
    return figures | {"failed": f"not done in {limit:g} s" if seconds >= limit else f"failed: {problem}"}


@contextlib.contextmanager
def started(words: list[object], log: Path, limit: float) -> Iterator[subprocess.Popen]:
    """Start a Python command, and kill it where it still runs after `limit` seconds, or at the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        # Unbuffered, as what was printed before an error would stand behind it.
        command = [PYTHON, "-u", *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def see_to_end(process: subprocess.Popen, log: Path, figures: Figures, attend: Attend | None) -> str | None:
    """Wait until a command ends; return what went wrong, if anything did."""
    try:
        if attend:
            attend(process, log, figures)
        code = process.wait()
        return last_words(log, code) if code else None
    except (httpx2.HTTPError, RuntimeError) as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return last_words(log, process.wait(2))  # a server whose connection broke is ending, and says why
        return str(error)


def last_words(log: Path, code: int) -> str:
    """Return the last line that a command said, after the signal that ended it, such as the system's for no memory."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return ", ".join(([signal.Signals(-code).name] if code < 0 else []) + lines[-1:]) or f"exit code {code}"


def watch(pid: int, peaks: dict[str, int]) -> None:
    """Keep the most memory that a process had, until it ends."""
    try:
        process = psutil.Process(pid)
        while True:
            memory = process.memory_info()
            found = {"allocated": memory.rss - memory.shared, "resident": memory.rss}
            peaks.update({name: max(peaks[name], value) for name, value in found.items()})
            time.sleep(0.1)
    except psutil.Error:
        return


def ask_server(
    process: subprocess.Popen, log: Path, figures: Figures, model: str, questions: list[str], answer_tokens: int
) -> None:
    """
    Ask a server twice, and end it by Ctrl-C.

    Args:
        figures: gets the seconds until it is `up`, of the `first` answer, of 1 token, of the `second`, and from Ctrl-C
            until it `ended` in order.
        model: the name of what is asked.
        questions: two that differ, as the beginning of a prompt that was asked before is not computed again.
        answer_tokens: the most tokens of the second answer.

    Raises:
        RuntimeError: it ended by itself before it was up, or not at all.
    """
    start = time.perf_counter()
    while not (address := re.search(r"^address: (\S+)/v1 ", log.read_text(encoding="utf-8"), re.MULTILINE)):
        if process.poll() is not None:
            raise RuntimeError("the server ended before it was up")
        time.sleep(0.1)
    with httpx2.Client(base_url=address[1], timeout=None, trust_env=False) as client:
        client.get("/health").raise_for_status()
        figures["up"] = time.perf_counter() - start
        for name, question, tokens in zip(("first", "second"), questions, (1, answer_tokens), strict=True):
            figures[name] = ask(client, model, question, tokens)
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    try:
        code = process.wait(MOST_TO_END)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"still running {MOST_TO_END} s after Ctrl-C") from None
    if code == 0:
        figures["ended"] = time.perf_counter() - start


def ask(client: httpx2.Client, model: str, question: str, tokens: int) -> float:
    """Return the seconds that an answer of so many tokens takes."""
    start = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    client.post("/v1/chat/completions", json=body).raise_for_status()
    return time.perf_counter() - start
