"""A process that starts warm is for everyone the one that a fresh interpreter would be."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from warm_starts import NAMES, PROJECT, warm_python

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
FACTS = """
import os, random, signal, sys, threading, torch
names = ("__name__", "__doc__", "__package__")
own = {name: globals().get(name) for name in names}
handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)]
print(sys.argv, sys.path, own, os.getcwd(), handlers, sys.modules["__main__"].names == names)
print(threading.enumerate()[0].name, threading.active_count(), os.umask(0), torch.get_num_threads())
print(os.environ["OF_THE_TEST"], len(os.environ), sys.stdin.read(), sys.stdout.encoding, sys.stdout.line_buffering)
print(sorted(map(int, os.listdir("/proc/self/fd")))[:3])
print("said", file=sys.stderr)
sys.exit(int(sys.argv[-1]))
"""


def run(program: str, words: list[str], folder: Path, **variables: str) -> tuple[int, str, str]:
    """How it ended and what it said."""
    options = {"cwd": folder, "env": ENVIRONMENT | {"OF_THE_TEST": "是"} | variables, "umask": 0o27}
    done = subprocess.run([program, *words], input="问", capture_output=True, encoding="utf-8", **options)
    return done.returncode, done.stdout, done.stderr


def test_it_finds_what_a_fresh_one_finds(tmp_path):
    file = tmp_path / "inner" / "facts.py"
    file.parent.mkdir()
    file.write_text(FACTS)
    fresh = [
        run(sys.executable, [*words, "a", "7"], tmp_path) for words in (["inner/facts.py"], ["-m", "inner.facts"])
    ]
    warm = [run(warm_python(), [*words, "a", "7"], tmp_path) for words in (["inner/facts.py"], ["-m", "inner.facts"])]
    assert warm == fresh
    assert [code for code, _, _ in warm] == [7, 7]


def test_it_draws_numbers_of_its_own(tmp_path):
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    first, second = (run(warm_python(), ["-c", code], tmp_path)[1].split() for _ in range(2))
    assert len(set(first + second)) == 6


@pytest.mark.parametrize(
    "code", ["1 / 0", "raise SystemExit('sorry')", "raise SystemExit", "import os; os._exit(3)", "assert 0, 'no'"]
)
def test_it_ends_as_a_fresh_one_does(code, tmp_path):
    assert run(warm_python(), ["-c", code], tmp_path) == run(sys.executable, ["-c", code], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGTERM])
def test_whoever_started_it_sees_the_signal_that_ended_it(number, tmp_path):
    assert run(warm_python(), ["-c", f"import os; os.kill(os.getpid(), {number:d})"], tmp_path)[0] == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it(number):
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    command, streams = [warm_python(), "-c", code], dict.fromkeys(("stdout", "stderr"), -1)
    # A run in the background of a shell ignores Ctrl-C, and so would what it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=ENVIRONMENT, preexec_fn=heed, **streams) as process:
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == -number
        assert (b"KeyboardInterrupt" in process.stderr.read()) == (number == signal.SIGINT)
    for _ in range(200):
        if not Path("/proc", str(pid)).exists():
            return
        time.sleep(0.05)
    pytest.fail("it lives on")


def test_only_the_warm_ones_know_their_modules(tmp_path):
    names = ["glm_peft.train", "glm_peft.models", "glm_peft", "transformers", "huggingface_hub", "torch"]
    code = f"import sys; print(*[name for name in {names} if name in sys.modules])"
    found = [run(warm_python(knows), ["-c", code], tmp_path)[1].split() for knows in NAMES]
    assert found == [names[1:], names[3:], names[5:]]


@pytest.mark.parametrize(
    ("knows", "variables", "words"),
    [
        ("glm_peft", {"HF_ENDPOINT": "http://127.0.0.1:9"}, []),
        ("torch", {"ATEN_CPU_CAPABILITY": "default"}, []),
        ("torch", {}, ["-B"]),
    ],
)
def test_what_is_read_at_the_start_asks_for_a_fresh_one(knows, variables, words, tmp_path):
    code = "import sys; print('torch' in sys.modules)"
    assert run(warm_python(knows), [*words, "-c", code], tmp_path, **variables)[1] == "False\n"


def test_another_hub_does_not_where_nothing_of_it_is_imported(tmp_path):
    code = (
        "import sys; print('torch' in sys.modules); from huggingface_hub import constants; print(constants.ENDPOINT)"
    )
    there = "http://127.0.0.1:9"
    assert run(warm_python("torch"), ["-c", code], tmp_path, HF_ENDPOINT=there)[1].split() == ["True", there]
