"""Where the reference numbers are, and small fixtures that more than one test file needs."""

import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
import warm_starts

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TESTS = Path(__file__).parent
REFERENCE_MODELS = TESTS / "reference" / "models"
SHARED_REFERENCE = Path(os.environ.get("GLM_PEFT_REFERENCE", TESTS.parents[1] / "shared" / "reference"))


def pytest_configure(config: pytest.Config) -> None:
    """Several workers share one server of warm starts, which ends with this process."""
    if getattr(config.option, "numprocesses", None) and sys.platform == "linux":
        os.environ[warm_starts.VARIABLE] = str(warm_starts.start_server())


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: every trainer would look through all of it, for a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def templates_compiled_once() -> Iterator[None]:
    """Hundreds of cards are written of a few templates, and each was compiled for every card."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


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


@pytest.fixture(scope="session", autouse=True)
def curves_without_pixels() -> Iterator[None]:
    """
    Runs in this process lay out their curves and write a file in the place of the picture.

    Its pixels take longer than all else of a short run. They are drawn in tests/test_curves.py, which has the function
    by its name, and wherever a test starts a command in a process of its own.
    """
    curves = sys.modules.get("glm_peft.training.curves")
    with pytest.MonkeyPatch.context() as patch:
        if curves:
            draw = curves.plot_training_curves

            def draw_without_pixels(*args: object) -> Path | None:
                from matplotlib.figure import Figure

                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"a picture"))
                    return draw(*args)

            patch.setattr(curves, "plot_training_curves", draw_without_pixels)
        yield
