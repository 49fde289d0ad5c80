"""What is written down of the machine that a run was on, and of what the run took."""

import platform
import re
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glm_peft.provenance.hardware import describe_hardware, measure_cost, peak_resident


def arguments(engine: str = "NO", processes: int = 1) -> SimpleNamespace:
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=engine))
    return SimpleNamespace(device=torch.device("cpu"), distributed_state=state, world_size=processes)


def test_a_cpu_is_named_with_its_threads_and_the_machine_is_not():
    found = describe_hardware(arguments())
    assert found["kind"] == "cpu" and found["processes"] == 1 and found["engine"] == "NO"
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] and found["device"] != socket.gethostname()


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_stage_of_zero_is_told(stage, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    assert describe_hardware(arguments("DEEPSPEED", 2))["zero_stage"] == int(stage)
    assert "zero_stage" not in describe_hardware(arguments("MULTI_GPU", 2))


def test_seconds_are_told_by_task_and_memory_in_bytes():
    found = measure_cost({"train_runtime": 2.5, "predict_runtime": 1.0, "train_loss": 3.0})
    assert found["seconds"] == {"train": 2.5, "predict": 1.0}
    assert found["peak_memory"] and all(isinstance(size, int) for size in found["peak_memory"].values())


def test_the_peak_is_that_of_this_process_alone(monkeypatch):
    # As `getrusage` counts it, it would begin at the peak of a launcher.
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=1 << 40))
    peak = peak_resident()
    own = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    assert own / 2 < peak <= own


def test_without_the_files_of_linux_the_system_is_asked(monkeypatch):
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert peak_resident() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert describe_hardware(arguments())["device"] == (platform.machine() or "CPU")


def test_of_several_data_sets_for_evaluation_the_seconds_are_added_up():
    results = {"eval_easy_runtime": 1.5, "eval_hard_runtime": 2.0}
    assert measure_cost(results)["seconds"] == {"evaluate": 3.5}


def test_nothing_is_measured_where_nothing_ran():
    assert measure_cost({}) == {}
