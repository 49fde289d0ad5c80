"""Freed memory is kept for the next step on CPUs, and nothing is touched elsewhere."""

import platform
import subprocess
import sys

import torch

from glm_peft.training.cpu_memory import keep_freed_memory

# The address of a block that is freed and asked for again, after one that would be mapped anew has come and gone.
CODE = """
import torch
from glm_peft.training.cpu_memory import keep_freed_memory
was_done = keep_freed_memory(torch.device("cpu"))
block = torch.ones(1 << 26)
heap = [line for line in open("/proc/self/maps").read().splitlines() if "[heap]" in line][0].split()[0].split("-")
print(was_done, int(heap[0], 16) <= block.data_ptr() < int(heap[1], 16))
"""


def test_a_large_block_is_taken_from_what_the_process_keeps():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    assert said == (["True", "True"] if platform.libc_ver()[0] == "glibc" else ["False", "False"])


def test_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: 1 / 0)
    assert not keep_freed_memory(torch.device("cuda"))
