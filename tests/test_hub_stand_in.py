"""The stand-in of the Hub answers huggingface_hub's own client as the Hub does."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hub_stand_in import Account, Fault, HubStandIn, running
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

FILES = {"config.json": b'{"a": 1}', "adapter_model.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running() as hub:
        hub.accounts["hf_writer"] = Account("mia", organizations={"lab": "write", "club": "read"})
        hub.accounts["hf_reader"] = Account("mia", role="read")
        yield hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_writer")


def additions() -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in FILES.items()]


def test_a_push_by_the_client_arrives_byte_for_byte_in_one_commit(hub: HubStandIn, api: HfApi):
    assert api.whoami()["name"] == "mia"
    api.create_repo("mia/adapter", private=True)
    info = api.create_commit("mia/adapter", additions(), commit_message="both")
    assert hub.files("mia/adapter") == FILES
    assert hub.titles("mia/adapter") == ["both"]
    assert hub.repositories["model", "mia/adapter"].private
    assert api.model_info("mia/adapter").sha == info.oid
    lfs = hashlib.sha256(FILES["adapter_model.safetensors"]).hexdigest()
    by_path = {file.path: file for file in api.list_repo_tree("mia/adapter", recursive=True)}
    assert by_path["adapter_model.safetensors"].lfs.sha256 == lfs
    assert hub.paths("PUT") == [f"PUT /lfs-store/{lfs}"]


def test_an_object_that_is_there_is_not_sent_again(hub: HubStandIn, api: HfApi):
    api.create_repo("mia/adapter")
    api.create_commit("mia/adapter", additions(), commit_message="first")
    api.create_repo("lab/adapter")
    api.create_commit("lab/adapter", additions(), commit_message="second")
    assert len(hub.paths("PUT")) == 1
    assert hub.files("lab/adapter") == FILES


def test_what_was_pushed_is_loaded_by_revision_and_tag(hub: HubStandIn, api: HfApi, tmp_path: Path):
    hub.add("mia/adapter", {"config.json": b"old"})
    old = api.model_info("mia/adapter").sha
    api.create_tag("mia/adapter", tag="v1")
    api.create_branch("mia/adapter", branch="next")
    api.create_commit("mia/adapter", additions(), commit_message="new", revision="next")
    read = {"repo_id": "mia/adapter", "cache_dir": tmp_path, "endpoint": hub.url}
    for revision in (old, "v1", "main"):
        assert Path(hf_hub_download(filename="config.json", revision=revision, **read)).read_bytes() == b"old"
    for name, content in FILES.items():
        assert Path(hf_hub_download(filename=name, revision="next", **read)).read_bytes() == content
    refs = api.list_repo_refs("mia/adapter")
    assert ({ref.name for ref in refs.branches}, {ref.name for ref in refs.tags}) == ({"main", "next"}, {"v1"})


def test_a_range_is_a_part(hub: HubStandIn):
    hub.add("mia/adapter", FILES)
    url = f"{hub.url}/mia/adapter/resolve/main/adapter_model.safetensors"
    answer = get_session().get(url, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, FILES["adapter_model.safetensors"][10:20])


def test_a_broken_download_is_resumed(hub: HubStandIn, tmp_path: Path):
    hub.add("mia/adapter", FILES)
    url = {"repo_id": "mia/adapter", "filename": "adapter_model.safetensors", "endpoint": hub.url}
    hub.faults.append(Fault("GET /lfs-store", "broken"))
    try:
        path = hf_hub_download(cache_dir=tmp_path, **url)
    except httpx2.ReadError:  # a reset in the middle, which the client does not mend
        path = hf_hub_download(cache_dir=tmp_path, **url)
    assert Path(path).read_bytes() == FILES["adapter_model.safetensors"]


def test_rights_are_refused_as_the_hub_does(hub: HubStandIn, api: HfApi, tmp_path: Path):
    hub.add("mia/hidden", FILES, private=True)
    hub.add("mia/gated", FILES, gated=True)
    reader = HfApi(endpoint=hub.url, token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("mia/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.auth_check("mia/hidden", write=True)
    api.auth_check("mia/hidden", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("club/new")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_nobody").whoami()
    read = {"filename": "config.json", "cache_dir": tmp_path, "endpoint": hub.url, "token": False}
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("mia/hidden", **read)
    with pytest.raises(GatedRepoError):
        hf_hub_download("mia/gated", **read)


def test_what_is_missing_is_told_apart(hub: HubStandIn, tmp_path: Path):
    hub.add("mia/adapter", FILES)
    read = {"repo_id": "mia/adapter", "cache_dir": tmp_path, "endpoint": hub.url}
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(filename="nothing.json", **read)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(filename="config.json", revision="nothing", **read)


def test_a_repository_that_is_there_and_a_parent_that_is_not_the_last(hub: HubStandIn, api: HfApi):
    hub.add("mia/adapter")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("mia/adapter")
    api.create_repo("mia/adapter", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("mia/adapter", additions(), commit_message="late", parent_commit="0" * 40)
    assert hub.titles("mia/adapter") == []


@pytest.mark.parametrize(("what", "times", "has_effect"), [(503, 1, False), ("reset", 1, False), ("lost", 1, True)])
def test_faults_come_before_or_after_the_effect(hub: HubStandIn, api: HfApi, what, times, has_effect):
    hub.faults.append(Fault("POST /api/repos/create", what, times))
    with pytest.raises((HfHubHTTPError, httpx2.TransportError)):
        api.create_repo("mia/adapter")
    assert (("model", "mia/adapter") in hub.repositories) is has_effect
    api.create_repo("mia/adapter", exist_ok=True)


def test_a_slow_answer_runs_into_the_clients_limit(hub: HubStandIn):
    hub.add("mia/adapter", FILES)
    hub.faults.append(Fault("GET /api/models/mia/adapter", "slow", seconds=0.5))
    with pytest.raises(httpx2.ReadTimeout):
        HfApi(endpoint=hub.url).model_info("mia/adapter", timeout=0.1)


def test_every_byte_that_was_sent_is_kept(hub: HubStandIn, api: HfApi):
    api.create_repo("mia/adapter")
    api.create_commit("mia/adapter", additions(), commit_message="both")
    for content in FILES.values():
        assert content in hub.everything_sent()
