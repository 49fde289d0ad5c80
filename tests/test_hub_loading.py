"""An adapter that was pushed is loaded back by its id: by stock PEFT, by the command, by revision, from the cache."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import short_runs
from hub_stand_in import Account, Fault, HubStandIn, running
from huggingface_hub import constants
from huggingface_hub.utils import _http
from warm_starts import warm_python

from glm_peft import predict, push
from glm_peft.adapters.saved_adapter import resolve_adapter
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.hub import download
from glm_peft.hub.download import fetch_adapter
from glm_peft.hub.upload import with_retries
from glm_peft.models.loading import load_config, load_tokenizer

TOKEN = "hf_" + "abcDEF0123456789" * 2
BASE, ADAPTER = "lab/tiny", "mia/adapter"
PROJECT = Path(__file__).parents[1]
QUESTION = "类型#裤*颜色#白色"
STOCK = """
import sys, torch, glm_peft
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, adapters = sys.argv[1], sys.argv[2:]
ids = torch.arange(5, 25)[None]
models = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name) for name in adapters]
models.append(AutoPeftModelForCausalLM.from_pretrained(adapters[0]))
with torch.no_grad():
    logits = [model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in models]
    bare = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
assert all(torch.equal(one, logits[0]) for one in logits), "the answers differ"
assert not torch.allclose(bare, logits[0]), "the adapter has no effect"
print(len(logits))
"""


@dataclass
class Published:
    """A trained adapter in its folder, and on the stand-in, with its base."""

    hub: HubStandIn
    folder: Path
    base: Path


@pytest.fixture(scope="module")
def published(tiny_model_dirs, tmp_path_factory) -> Iterator[Published]:
    """Trained on a local base, and pushed with the id of that base on the stand-in."""
    folder, base = tmp_path_factory.mktemp("run") / "output", tiny_model_dirs["chatglm3"]
    short_runs.run(short_runs.training_words(base, folder, "--max_steps", "3"))
    with running() as hub, pytest.MonkeyPatch.context() as patch:
        hub.accounts[TOKEN] = Account("mia")
        hub.add(BASE, {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()})
        set_up(hub, patch)
        push.main([str(folder), "--repo_id", ADAPTER, "--base_model_id", BASE, "--tags", "v1"])
        yield Published(hub, folder, base)


@pytest.fixture
def hub(published: Published, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    """The stand-in, taken for the Hub by this process, which does not wait between attempts."""
    published.hub.faults.clear()
    published.hub.requests.clear()
    set_up(published.hub, monkeypatch)
    return published.hub


def set_up(hub: HubStandIn, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(download, "with_retries", partial(with_retries, sleep=lambda seconds: None))
    patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    patch.setenv("HF_TOKEN", TOKEN)


def run_python(words: list[str], endpoint: str, home: Path) -> str:
    """What a process prints that knows of the stand-in and has imported nothing that asks a Hub."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [warm_python("torch"), *words], env=environment, cwd=home, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_peft_loads_it_by_id_in_a_fresh_process_with_equal_answers(published: Published, tmp_path: Path):
    published.hub.faults.clear()
    words = ["-c", STOCK, BASE, ADAPTER, str(published.folder)]
    assert run_python(words, published.hub.url, tmp_path).strip() == "3"


def test_the_command_answers_by_id_and_again_without_the_hub(published: Published, tmp_path: Path, capsys):
    published.hub.faults.clear()
    asked = ["--prompt", QUESTION, "--max_new_tokens", "8", "--model_name_or_path"]
    with pytest.MonkeyPatch.context() as patch:
        local = [str(published.base), "--adapter_name_or_path", str(published.folder)]
        patch.setattr(sys, "argv", ["predict.py", *asked, *local])
        predict.main()
    expected = capsys.readouterr().out
    words = ["-m", "glm_peft.predict", *asked, BASE, "--adapter_name_or_path", ADAPTER, "--adapter_revision", "v1"]
    assert run_python(words, published.hub.url, tmp_path) == expected
    nobody = "http://127.0.0.1:9"
    assert run_python(words, nobody, tmp_path) == expected


def test_a_revision_is_one_commit_by_whatever_name(hub: HubStandIn, published: Published, tmp_path: Path):
    repository = hub.repositories["model", ADAPTER]
    commit = repository.tags["v1"]
    folders = {fetch_adapter(ADAPTER, revision, str(tmp_path)) for revision in (None, "main", "v1", commit)}
    assert {Path(folder).name for folder in folders} == {commit}
    (folder,) = folders
    assert (Path(folder) / "adapter_model.safetensors").read_bytes() == (
        published.folder / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((Path(folder) / "provenance.json").read_text())["base"]["name"] == BASE


def test_a_folder_is_taken_as_it_is_and_has_no_revision(tmp_path: Path):
    assert fetch_adapter(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UserError, match="--adapter_revision v1 is for a Hub id"):
        fetch_adapter(str(tmp_path), "v1")


@pytest.mark.parametrize("what", ["reset", "lost", 500, 503])
def test_a_hub_that_fails_leaves_the_cache(hub: HubStandIn, tmp_path: Path, what: int | str):
    folder = fetch_adapter(ADAPTER, cache_dir=str(tmp_path))
    hub.faults.append(Fault("", what, times=1000))
    assert fetch_adapter(ADAPTER, cache_dir=str(tmp_path)) == folder


def test_a_reset_says_that_the_cache_is_used(hub: HubStandIn, tmp_path: Path, caplog):
    fetch_adapter(ADAPTER, cache_dir=str(tmp_path))
    hub.faults.append(Fault("GET /api", "reset", times=1000))
    with caplog.at_level(logging.WARNING):
        fetch_adapter(ADAPTER, cache_dir=str(tmp_path))
    assert "The connection to 127.0.0.1 broke: using what is in the cache" in caplog.text


@pytest.mark.parametrize("what", ["reset", "lost", 503])
def test_the_base_comes_from_the_cache_too(hub: HubStandIn, tmp_path: Path, what: int | str):
    asked = ModelArguments(BASE, cache_dir=str(tmp_path))
    expected = load_tokenizer(asked).get_vocab(), load_config(asked).to_dict()
    hub.faults.append(Fault("", what, times=10000))
    assert (load_tokenizer(asked).get_vocab(), load_config(asked).to_dict()) == expected


@pytest.mark.parametrize("what", ["reset", "lost", "broken", 503, 429])
def test_a_fault_at_any_request_of_a_download_is_mended(hub: HubStandIn, tmp_path: Path, what: int | str):
    expected = fetch_adapter(ADAPTER, cache_dir=str(tmp_path / "whole"))
    requests = hub.paths(ADAPTER)
    for number, request in enumerate(requests):
        hub.faults[:] = [Fault("", what, skip=number)]
        folder = Path(fetch_adapter(ADAPTER, cache_dir=str(tmp_path / str(number))))
        assert hub.faults[0].times == 0, request
        for file in Path(expected).iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes(), request


def test_another_page_in_the_place_of_a_file_is_asked_for_again(hub: HubStandIn, tmp_path: Path):
    for pattern in ("GET /.*/resolve/.*json", "GET /lfs-store"):  # as a network does that asks to sign in first
        hub.faults.append(Fault(pattern, "garbage"))
        folder = Path(fetch_adapter(ADAPTER, cache_dir=str(tmp_path / pattern[-5:])))
        assert hub.faults[-1].times == 0
        assert (folder / "adapter_config.json").read_bytes().startswith(b"{")
        assert (folder / "adapter_model.safetensors").stat().st_size > 1000


def test_without_hub_and_cache_one_sentence_says_so(hub: HubStandIn, tmp_path: Path):
    hub.faults.append(Fault("", 503, times=1000))
    with pytest.raises(UserError, match="mia/adapter is no folder or Hub id that is in the cache, and the Hub cannot"):
        fetch_adapter(ADAPTER, cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("mia/nothing", None, r"mia/nothing is no folder or Hub id that can be seen \(404\)"),
        ("lab/hidden", None, r"lab/hidden is no folder or Hub id that can be seen \(404\)"),
        ("mia/gated", None, "The adapter mia/gated is gated"),
        (ADAPTER, "v9", "--adapter_revision v9 is no branch, tag or commit of mia/adapter"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_sentence(hub, tmp_path, monkeypatch, name: str, revision, said: str):
    hub.add("lab/hidden", {"adapter_config.json": b"{}"}, private=True)
    hub.add("mia/gated", {"adapter_config.json": b"{}"}, gated=True)
    if "gated" in name:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=said) as error:
        fetch_adapter(name, revision, str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base_is_refused_by_what_the_hub_says_of_it(hub, tiny_model_dirs, tmp_path):
    base = str(tiny_model_dirs["glm4"])
    asked = ModelArguments(base, adapter_name_or_path=ADAPTER, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"was trained on {BASE}, of the generation chatglm3, but .* is of glm4"):
        resolve_adapter(asked, is_trainable=False)


def test_an_id_in_the_place_of_another_is_recognised_by_its_small_files(hub: HubStandIn, tmp_path: Path):
    with pytest.raises(UserError, match=f"{ADAPTER} is a PEFT adapter of the method prefix_tuning, and a base model"):
        load_config(ModelArguments(ADAPTER, cache_dir=str(tmp_path)))
    with pytest.raises(UserError, match=f"{BASE} is a base model.*: --model_name_or_path or --base takes {BASE}"):
        resolve_adapter(ModelArguments(BASE, adapter_name_or_path=BASE, cache_dir=str(tmp_path)), is_trainable=False)


def test_a_revision_without_an_adapter_is_refused():
    with pytest.raises(UserError, match="--adapter_revision is for --adapter_name_or_path, found v1"):
        resolve_adapter(ModelArguments("base", adapter_revision="v1"), is_trainable=False)
