"""Sending an adapter to a stand-in of the Hub: what arrives, what never leaves, and what bad networks do to it."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import short_runs
import torch
from hub_stand_in import Account, Fault, HubStandIn, running
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import save_file
from warm_starts import warm_python

from glm_peft import push
from glm_peft.hub.errors import Unsent
from glm_peft.hub.upload import Target, with_retries
from glm_peft.publishing import callback as push_callback
from glm_peft.publishing import files as push_files

TOKEN = "hf_" + "abcDEF0123456789" * 2
BASE = "THUDM/chatglm3-6b"
SENT = ["README.md", "adapter_config.json", "adapter_model.safetensors", "all_results.json", "provenance.json"]
SENT += ["training_curves.png"]
PUSH = ["--repo_id", "mia/adapter", "--base_model_id", BASE]
OF_A_PUSH = "mia/adapter|whoami|repos/create|validate-yaml|lfs-store"
PROJECT = Path(__file__).parents[1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that this process takes for the Hub, with no waits between attempts."""
    with running() as hub:
        hub.accounts[TOKEN] = Account("mia", organizations={"lab": "write", "club": "read"})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=no_wait, time=time.time, monotonic=time.monotonic))
        monkeypatch.setattr(push_callback, "with_retries", partial(with_retries, sleep=no_wait))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The output folder of a run on a local base, with everything in it that must stay at home."""
    folder = tmp_path / "wangxiaoming" / "output"
    (folder / "checkpoint-3").mkdir(parents=True)
    base = str(tmp_path / "wangxiaoming" / "chatglm3")
    config = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": base, "num_virtual_tokens": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.arange(64.0).view(2, 32)}, folder / "adapter_model.safetensors")
    results = {"eval_rouge-l": 31.25, "eval_bleu-4": 8.5, "train_runtime": 3.0}
    (folder / "all_results.json").write_text(json.dumps(results))
    record = {"base": {"name": "chatglm3"}, "recipe": {"train_file": "a b.json"}}
    (folder / "provenance.json").write_text(json.dumps(record))
    (folder / "training_curves.png").write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    for name in ("prefix_encoder.safetensors", "optimizer.pt", "training_args.bin", "generated_predictions.jsonl"):
        (folder / name).write_bytes(b"SECRET " + name.encode())
    (folder / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"SECRET checkpoint")
    return folder


def no_wait(seconds: float) -> None:
    """In the place of a wait."""


def type_push(*words: Any) -> None:
    """The command in this process."""
    push.main([str(word) for word in words], sleep=no_wait)


def type_words(command: str) -> None:
    """A command that was printed, in this process."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "glm_peft.push"]
    type_push(*words[3:])


def refusal(capsys: pytest.CaptureFixture[str], act: Callable[[], Any]) -> str:
    """The one line of a command that ends with 2."""
    with pytest.raises(SystemExit) as left:
        act()
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert TOKEN not in lines[0]
    return lines[0]


def test_a_push_sends_the_named_files_in_one_commit_that_names_the_scores(hub: HubStandIn, adapter: Path, caplog):
    before = sorted(path.name for path in adapter.iterdir())
    rows = [{"prompt": f"问{number}", "labels": "答", "predict": "答"} for number in range(5)]
    (adapter / "generated_predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("INFO"):
        type_push(adapter, *PUSH, "--tags", "v1", "best", "--card_examples", "2")
    (said,) = [line for line in caplog.messages if line.startswith("To mia/adapter, for all to read")]
    assert all(name in said for name in SENT) and "in the card stand 2 rows of data" in said
    sent = hub.files("mia/adapter")
    assert sorted(sent) == SENT
    assert hub.titles("mia/adapter") == [f"Adapter for {BASE}: rouge-l 31.25, bleu-4 8.5 (eval)"]
    assert sent["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(sent["provenance.json"])["base"]["name"] == BASE
    card = sent["README.md"].decode()
    assert f"base_model: {BASE}" in card and "| 问1 |" in card and "问2" not in card
    repository = hub.repositories["model", "mia/adapter"]
    assert repository.tags == dict.fromkeys(("v1", "best"), repository.branches["main"])
    assert sorted(path.name for path in adapter.iterdir()) == before


def test_nothing_that_is_sent_tells_of_the_machine_its_user_or_a_token(hub: HubStandIn, adapter: Path, caplog):
    type_push(adapter, *PUSH)
    sent = hub.everything_sent()
    for private in (TOKEN, str(adapter.parents[1]), "wangxiaoming", "SECRET", str(Path.home()) + "/"):
        assert private.encode() not in sent, private
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(hub.paths())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training_curves.png", "\x89PNG {folder}"),
        ("adapter_config.json", '{{"peft_type": "PREFIX_TUNING", "revision": "{folder}"}}'),
        ("provenance.json", '{{"recipe": {{"token": "{token}"}}}}'),
        ("all_results.json", '{{"log": "hf_another0123456789012"}}'),
        ("generated_predictions.jsonl", '{{"prompt": "ls {folder}", "predict": "", "labels": ""}}'),
    ],
)
def test_a_file_that_tells_of_this_machine_stops_the_push(hub, adapter, capsys, name: str, content: str):
    (adapter / name).write_text(content.format(folder=adapter, token=TOKEN), encoding="utf-8")
    said = refusal(capsys, lambda: type_push(adapter, *PUSH))
    told = "README.md" if name == "generated_predictions.jsonl" else name
    assert f"{told} holds a path of this machine or a token: nothing was sent" in said
    assert hub.paths("^(POST|PUT)") == []


def test_the_tokenizer_that_peft_names_is_the_bases(hub: HubStandIn, adapter: Path):
    config = {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": str(adapter.parent / "chatglm3")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    type_push(adapter, *PUSH)
    sent = json.loads(hub.files("mia/adapter")["adapter_config.json"])
    assert sent == {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": BASE, "base_model_name_or_path": BASE}


def test_a_dry_run_lists_files_and_sizes_and_shows_the_card_without_a_request(hub: HubStandIn, adapter: Path, capsys):
    type_push(adapter, *PUSH, "--dry_run")
    shown = capsys.readouterr().out
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert re.search(rf"^  adapter_model.safetensors +{size / 1000:.1f} kB$", shown, re.MULTILINE)
    assert all(name in shown for name in SENT)
    assert f"base_model: {BASE}" in shown
    assert str(adapter) not in shown
    assert hub.requests == []


def test_a_local_base_asks_for_its_id_before_anything_is_sent(hub: HubStandIn, adapter: Path, capsys):
    sentence = refusal(capsys, lambda: type_push(adapter, "--repo_id", "mia/adapter"))
    assert "is a folder of this machine" in sentence and "give --base_model_id" in sentence
    assert hub.requests == []


@pytest.mark.parametrize("base", ["/srv/chatglm", "./chatglm", "a/b/c", "user--name/x"])
def test_a_base_id_that_is_none_is_refused(hub: HubStandIn, adapter: Path, capsys, base: str):
    said = refusal(capsys, lambda: type_push(adapter, "--repo_id", "mia/adapter", "--base_model_id", base))
    assert f"--base_model_id {base} is no Hub id" in said


def test_a_base_that_was_a_relative_folder_is_known_by_the_record(adapter: Path):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "models/chatglm3"}))
    with pytest.raises(ValueError, match="models/chatglm3 is a folder of this machine"):
        push_files.find_base(adapter)
    config.write_text(json.dumps({"base_model_name_or_path": BASE}))
    (adapter / "provenance.json").write_text(json.dumps({"base": {"name": BASE}}))
    assert push_files.find_base(adapter) == BASE


def test_a_branch_is_made_and_a_new_repository_is_private_if_asked(hub: HubStandIn, adapter: Path):
    type_push(adapter, *PUSH, "--revision", "next", "--private", "--commit_message", "mine")
    assert sorted(hub.files("mia/adapter", "next")) == SENT
    assert hub.files("mia/adapter") == {}
    assert hub.titles("mia/adapter") == ["mine"]
    assert hub.repositories["model", "mia/adapter"].private


def test_a_second_push_sends_what_is_new_alone(hub: HubStandIn, adapter: Path):
    type_push(adapter, *PUSH)
    type_push(adapter, *PUSH)
    assert len(hub.titles("mia/adapter")) == 1
    (adapter / "all_results.json").write_text('{"eval_rouge-l": 40.0}')
    hub.requests.clear()
    type_push(adapter, *PUSH)
    assert len(hub.titles("mia/adapter")) == 2
    assert hub.paths("PUT") == []
    assert b"40.0" in hub.files("mia/adapter")["all_results.json"]


def test_a_tag_that_is_elsewhere_is_not_moved(hub: HubStandIn, adapter: Path, capsys):
    type_push(adapter, *PUSH, "--tags", "v1")
    first = hub.repositories["model", "mia/adapter"].branches["main"]
    (adapter / "all_results.json").write_text("{}")
    said = refusal(capsys, lambda: type_push(adapter, *PUSH, "--tags", "v1"))
    assert "The tag v1 is at another commit of mia/adapter already" in said
    assert hub.repositories["model", "mia/adapter"].tags == {"v1": first}


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [
        ("club/adapter", "club is not the token's user mia, who may only read there"),
        ("other/adapter", "other is not the token's user mia, who is no member of it"),
        ("mia/whole", "--repo_id mia/whole holds a whole model (model.safetensors)"),
        ("a/b/c", "--repo_id a/b/c is no name that the Hub allows"),
        ("mia/--x", "--repo_id mia/--x is no name that the Hub allows"),
        ("other/theirs", "The token for the Hub may not write to other/theirs"),
    ],
)
def test_what_cannot_be_written_to_is_told_before_anything_is_sent(hub, adapter, capsys, repo_id: str, said: str):
    hub.add("mia/whole", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.add("other/theirs", {"adapter_config.json": b"{}"})
    assert said in refusal(capsys, lambda: type_push(adapter, "--repo_id", repo_id, "--base_model_id", BASE))
    assert hub.paths("^(POST|PUT)") == []


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (Account("mia", role="read"), "may not write to --repo_id mia/adapter"),
        (
            Account("mia", "fineGrained", scoped=[{"entity": {"name": "lab"}, "permissions": ["repo.write"]}]),
            "may not write to --repo_id mia/adapter",
        ),
        (None, "The Hub does not accept the token"),
    ],
)
def test_a_token_without_the_right_is_told_at_once(hub: HubStandIn, adapter: Path, capsys, account, said: str):
    hub.accounts = {TOKEN: account} if account else {}
    assert said in refusal(capsys, lambda: type_push(adapter, *PUSH))
    assert hub.paths("^(POST|PUT)") == []


@pytest.mark.parametrize(
    "token",
    [None, {}, {"accessToken": None}, {"accessToken": {"role": "fineGrained", "fineGrained": None}}]
    + [{"accessToken": {"fineGrained": {"scoped": [{"entity": None, "permissions": None}]}}}],
)
def test_what_a_server_does_not_say_of_the_token_does_not_keep_from_sending(hub: HubStandIn, adapter: Path, token):
    hub.accounts = {TOKEN: Account("mia", answer={"auth": token, "orgs": None})}
    type_push(adapter, *PUSH)
    assert sorted(hub.files("mia/adapter")) == SENT


def test_a_repository_that_was_renamed_is_sent_to_under_its_new_name(hub: HubStandIn, adapter: Path, capsys):
    hub.add("mia/renamed", {"adapter_config.json": b"{}"})
    hub.moved["mia/adapter"] = "mia/renamed"
    type_push(adapter, *PUSH, "--tags", "v1")
    assert sorted(hub.files("mia/renamed")) == SENT
    assert "/mia/renamed/commit/" in capsys.readouterr().out
    assert [key for key in hub.repositories if "mia/adapter" in key] == []


def test_without_a_token_nothing_is_tried(hub: HubStandIn, adapter: Path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(adapter / "none"))
    assert "There is no token for the Hub" in refusal(capsys, lambda: type_push(adapter, *PUSH))
    assert hub.paths("^(POST|PUT)") == []


def test_a_name_without_a_namespace_is_the_users_own(hub: HubStandIn, adapter: Path):
    type_push(adapter, "--repo_id", "adapter", "--base_model_id", BASE)
    assert sorted(hub.files("mia/adapter")) == SENT


@pytest.mark.parametrize("what", [503, "reset", "lost", "broken", "garbage"])
def test_a_fault_at_any_request_neither_loses_nor_doubles_anything(hub: HubStandIn, adapter: Path, what: int | str):
    words = (adapter, *PUSH, "--revision", "next", "--tags", "v1")
    type_push(*words)
    requests = hub.paths(OF_A_PUSH)
    expected = hub.files("mia/adapter", "next")
    for number, request in enumerate(requests):
        hub.repositories.clear()
        hub.objects.clear()
        hub.requests.clear()
        hub.faults[:] = [Fault(OF_A_PUSH, what, skip=number)]
        type_push(*words)
        assert hub.faults[0].times == 0, request
        assert hub.files("mia/adapter", "next") == expected, request
        assert len(hub.titles("mia/adapter")) == 1, request
        assert list(hub.repositories["model", "mia/adapter"].tags) == ["v1"], request


@pytest.mark.parametrize(
    "pattern", ["whoami", "repos/create", "validate-yaml", "preupload", "objects/batch", "PUT", "/commit/"]
)
def test_what_fails_for_good_is_sent_by_the_last_line(hub, adapter, capsys, pattern: str):
    hub.faults.append(Fault(pattern, 503, times=1000))
    with pytest.raises(SystemExit) as left:
        type_push(adapter, *PUSH, "--commit_message", "it's mine")
    *said, command = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert f"error: The adapter could not be sent (the Hub answered 503) and is in {adapter} as before" in said[-1]
    hub.faults.clear()
    type_words(command)
    assert hub.titles("mia/adapter") == ["it's mine"]
    assert sorted(hub.files("mia/adapter")) == SENT


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 412, 422])
def test_after_a_refusal_at_any_request_the_same_command_doubles_nothing(hub, adapter, capsys, status: int):
    words = (adapter, *PUSH, "--tags", "v1")
    type_push(*words)
    requests = hub.paths(OF_A_PUSH)
    for number, request in enumerate(requests):
        hub.repositories.clear()
        hub.objects.clear()
        hub.faults[:] = [Fault(OF_A_PUSH, status, times=1000, skip=number)]
        assert len(refusal(capsys, lambda: type_push(*words))) > len("error: "), request
        hub.faults.clear()
        type_push(*words)
        assert len(hub.titles("mia/adapter")) == 1, request
        assert sorted(hub.files("mia/adapter")) == SENT, request
        assert list(hub.repositories["model", "mia/adapter"].tags) == ["v1"], request


def test_what_another_pushed_meanwhile_is_kept(hub: HubStandIn, adapter: Path):
    repository = hub.add("mia/adapter", {"notes.md": b"mine"})
    hub.faults.append(Fault("/commit/", 412))
    type_push(adapter, *PUSH)
    assert hub.files("mia/adapter")["notes.md"] == b"mine"
    assert len(repository.commits) == 3


def test_a_push_that_is_interrupted_is_typed_again(hub: HubStandIn, adapter: Path):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    hub.faults.append(Fault("/commit/", 412))
    with pytest.raises(SystemExit) as left:
        push.main([str(adapter), *PUSH], sleep=interrupt)
    assert left.value.code == 130
    type_push(adapter, *PUSH)
    assert len(hub.titles("mia/adapter")) == 1


def test_waits_grow_and_end(monkeypatch):
    waits: list[float] = []

    def fail() -> None:
        raise Unsent("no")

    with pytest.raises(Unsent):
        with_retries(fail, waits.append)
    assert waits == [1, 2, 4, 8, 16]


def test_a_longer_wait_than_one_waits_for_ends_the_attempts():
    def fail() -> None:
        raise Unsent("later", retry_after=3600)

    waits: list[float] = []
    with pytest.raises(Unsent):
        with_retries(fail, waits.append)
    assert waits == []


def training_words(tiny_model_dirs: dict[str, Path], tmp_path: Path, *more: str) -> list[str]:
    words = short_runs.training_words(tiny_model_dirs["chatglm3"], tmp_path / "output", *more)
    hub = ["--push_to_hub", "--hub_model_id", "mia/adapter", "--base_model_id", BASE]
    return [*words, "--max_steps", "3", "--save_steps", "1", *hub]


STEPS = [f"Step {step} of an adapter for {BASE}" for step in (1, 2, 3)]


# every_save, as it is by itself, is in the run of two processes below.
@pytest.mark.parametrize(("strategy", "steps"), [("checkpoint", STEPS), ("end", [])])
def test_training_sends_what_it_saves(hub, tiny_model_dirs, tmp_path, caplog, strategy: str, steps: list[str]):
    words = training_words(tiny_model_dirs, tmp_path, "--hub_strategy", strategy, "--hub_private_repo")
    with caplog.at_level("INFO"):
        short_runs.run(words)
    assert "To mia/adapter, for all to read unless that is private, go " in caplog.text
    titles = hub.titles("mia/adapter")
    assert re.fullmatch(rf"Adapter for {BASE}: loss [\d.]+ \(train\)", titles[-1])
    assert [title.partition(":")[0] for title in titles[:-1]] == steps
    sent = hub.files("mia/adapter")
    last = [f"last-checkpoint/{name}" for name in SENT[1:3]] if strategy == "checkpoint" else []
    assert set(sent) == {*SENT, *last}
    assert sent["adapter_model.safetensors"] == (tmp_path / "output" / "adapter_model.safetensors").read_bytes()
    assert hub.repositories["model", "mia/adapter"].private
    for private in (str(tmp_path), TOKEN, str(Path.home()) + "/"):
        assert private.encode() not in hub.everything_sent()


def test_training_without_a_network_ends_well_and_its_last_line_sends_the_adapter(
    hub, tiny_model_dirs, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    short_runs.run(training_words(tiny_model_dirs, tmp_path, "--hub_private_repo", "--hub_revision", "next"))
    output = tmp_path / "output"
    assert "It is not known whether mia/adapter can be written to (HF_HUB_OFFLINE is set)" in caplog.text
    told = [
        message for message in caplog.messages if "could not be sent to the Hub (HF_HUB_OFFLINE is set)" in message
    ]
    assert [message.partition(" could")[0] for message in told[:-1]] == [
        str(output / f"checkpoint-{step}") for step in (1, 2, 3)
    ]
    assert caplog.messages[-1] == told[-1]
    assert json.loads((output / "all_results.json").read_text())["train_loss"] > 0
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    type_words(told[-1].splitlines()[-1])
    sent = hub.files("mia/adapter", "next")
    assert sent["adapter_model.safetensors"] == (output / "adapter_model.safetensors").read_bytes()
    assert hub.repositories["model", "mia/adapter"].private


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--base_model_id", "/srv/base"], "--base_model_id /srv/base is no Hub id"),
        (["--hub_strategy", "all_checkpoints"], "--hub_strategy all_checkpoints would send the optimizer's state"),
        (["--hub_model_id", "club/adapter"], "--hub_model_id club/adapter cannot be made"),
        (["--peft_type", "none"], "--push_to_hub sends adapters"),
    ],
)
def test_what_is_wrong_with_a_push_is_told_before_training(hub, tiny_model_dirs, tmp_path, capsys, more, said):
    words = training_words(tiny_model_dirs, tmp_path)
    given = {word: None for word in more if word.startswith("--")}
    for flag in given:
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    if "none" in more:
        at = words.index("--num_virtual_tokens")
        del words[at : at + 2]
    assert said in refusal(capsys, lambda: short_runs.run([*words, *more]))
    assert hub.paths("^(POST|PUT)") == []
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def test_a_local_base_without_an_id_is_told_before_training(hub, tiny_model_dirs, tmp_path, capsys):
    words = training_words(tiny_model_dirs, tmp_path)[:-2]
    said = refusal(capsys, lambda: short_runs.run(words))
    assert f"The base {tiny_model_dirs['chatglm3']} is a folder of this machine" in said
    assert hub.requests == []


def environment_of(hub: HubStandIn) -> dict[str, str]:
    """Of a process that knows of the stand-in."""
    facts = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return os.environ | facts | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_of_two_processes_one_pushes_and_nothing_of_the_machine_is_sent(hub, tiny_model_dirs, tmp_path):
    hub.faults.append(Fault("/commit/", 403, times=1000, skip=3))
    words = training_words(tiny_model_dirs, tmp_path, "--card_language", "zh")
    config = PROJECT / "accelerate_configs" / "cpu_2_processes.yaml"
    launch = [warm_python("torch"), "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", str(free_port()), str(PROJECT / "glm_peft" / "train.py"), *words]
    done = subprocess.run(launch, env=environment_of(hub), capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    assert len(hub.paths("whoami")) == 1
    assert [title.partition(":")[0] for title in hub.titles("mia/adapter")] == STEPS
    assert "could not be sent to the Hub (The token for the Hub may not write to mia/adapter" in done.stderr
    hub.faults.clear()
    type_words(done.stderr.splitlines()[-1])
    assert len(hub.titles("mia/adapter")) == 4
    for private in (str(tmp_path), str(PROJECT), TOKEN, str(Path.home()) + "/"):
        assert private.encode() not in hub.everything_sent(), private
    assert TOKEN not in done.stdout + done.stderr


def pusher_of(folder: Path) -> push_callback.HubPush:
    """What a training run in a folder sends with, at its end alone."""
    return push_callback.HubPush(Target("mia/adapter"), BASE, SimpleNamespace(hub_strategy="end", output_dir=folder))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413])
def test_a_refusal_at_the_end_of_training_is_told_with_the_command(hub, adapter, caplog, status: int):
    hub.faults.append(Fault("/commit/", status, times=1000))
    pusher_of(adapter).finish()
    (told,) = [message for message in caplog.messages if "could not be sent" in message]
    assert f"and is in {adapter}; this command sends it:\npython -m glm_peft.push " in told
    assert TOKEN not in caplog.text
    hub.faults.clear()
    type_words(told.splitlines()[-1])
    assert sorted(hub.files("mia/adapter")) == SENT


def test_a_save_that_cannot_be_sent_makes_later_saves_try_once(hub, adapter):
    arguments = SimpleNamespace(hub_strategy="every_save", output_dir=adapter)
    pusher = push_callback.HubPush(Target("mia/adapter"), BASE, arguments)
    checkpoint = adapter / "checkpoint-3"
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")

    def attempts() -> int:
        hub.requests.clear()
        pusher.on_save(arguments, SimpleNamespace(global_step=3), None)
        return len(hub.paths("/commit/"))

    hub.faults.append(Fault("/commit/", 503, times=1000))
    assert [attempts(), attempts()] == [3, 1]
    hub.faults.clear()
    assert [attempts(), pusher.tries_at_save] == [1, 3]


def test_only_the_first_process_sends(monkeypatch, tmp_path):
    monkeypatch.setattr(push_callback, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    arguments = SimpleNamespace(hub_strategy="every_save", output_dir=str(tmp_path))
    pusher = push_callback.HubPush(Target("mia/adapter"), BASE, arguments)
    pusher.on_save(arguments, SimpleNamespace(global_step=1), None)
    pusher.finish()
    assert not pusher.is_sender
    assert list(tmp_path.iterdir()) == []
