"""Where the reference numbers are, and small fixtures that more than one test file needs."""

import gc
import os
import sys
from pathlib import Path

import pytest
from shortcuts import take_shortcuts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "True")  # as Gradio sets it for the commands that the page starts

TESTS = Path(__file__).parent
REFERENCE_MODELS = TESTS / "reference" / "models"
SHARED_REFERENCE = Path(os.environ.get("GLM_PEFT_REFERENCE", TESTS.parents[1] / "shared" / "reference"))


def pytest_configure(config: pytest.Config) -> None:
    """Several workers share one server of warm starts, which ends with this process."""
    import warm_starts  # here, as its processes have the environment of the moment, with what is set above

    if getattr(config.option, "numprocesses", None) and sys.platform == "linux":
        os.environ[warm_starts.VARIABLE] = str(warm_starts.start_server())


def pytest_collection_finish() -> None:
    """Make runs in this process quicker; what has been imported is no garbage that every trainer must look through."""
    gc.collect()
    gc.freeze()
    take_shortcuts()


@pytest.fixture(scope="session")
def reference_models() -> Path:
    """The folder of tiny models in the published layout, with what the published code computed."""
    return REFERENCE_MODELS


@pytest.fixture(scope="session")
def reference_tokenizers() -> Path:
    """The folder of published tokenizers, which are not ours to ship."""
    folder = SHARED_REFERENCE / "tokenizers"
    if not folder.is_dir():
        pytest.skip(
            f"the published tokenizers are not at {folder} (set GLM_PEFT_REFERENCE to the folder that has them)"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A made-up two-layer model in the published layout for each generation, with a small tokenizer of its own."""
    from make_tiny_model import make_tiny_model
    from tiny_options import GENERATIONS

    root = tmp_path_factory.mktemp("tiny_models")
    return {generation: make_tiny_model(root / generation, generation, hidden_size=32) for generation in GENERATIONS}
