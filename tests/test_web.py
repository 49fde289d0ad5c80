"""The page without a browser: its flags, its functions, and what its server gives to whom."""

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from fastapi.testclient import TestClient
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_starts import ENVIRONMENT, warm_python

from glm_peft.arguments.address import bind
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.web import parse_web_arguments
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.page import answers, commands
from glm_peft.page.adapter_tab import AdapterTab
from glm_peft.page.answers import Round, find_pairs
from glm_peft.page.app import build_page, make_application
from glm_peft.page.commands import run_command
from glm_peft.page.compare import CompareTab
from glm_peft.page.context import Context, told
from glm_peft.page.data_tab import measure_file, split_flags
from glm_peft.page.train_tab import FLAGS, find_recipes, train_words
from glm_peft.page.trainings import Trainings, has_finished, read_progress, shorten_log, was_stopped
from glm_peft.page.words import _CHINESE, _ENGLISH, say
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answer_text import Piece
from glm_peft.serving.dialogue import Dialogue

PROJECT = Path(__file__).parents[1]
ASSETS, ROWS = PROJECT / "glm_peft" / "assets", PROJECT / "examples" / "demo" / "train.json"
ENGLISH, CHINESE = (SimpleNamespace(headers={"accept-language": tag}) for tag in ("en-US,en", "zh-CN,zh;q=0.9"))
LOG = """00:00:00 INFO The run
  training: 1,000 steps, 4 epochs of 2,000 rows
  0%|          | 0/1000 [00:00<?, ?it/s]\r  1%|          | 10/1000 [00:01<01:39,  9.9it/s]
{'loss': '0.5', 'learning_rate': '0.02', 'epoch': '0.04'}
 50%|#####     | 1/2 [00:00<00:00, 2it/s]\x1b[A\r
{'eval_loss': '0.4', 'epoch': '0.08'}
  2%|          | 23/1000 [00:02<01:39,  9.9it/s]
"""


class EchoEngine:
    """Answers with letters of the name, one after the other; whoever is called `broken` cannot."""

    def __init__(self) -> None:
        self.answerers = SimpleNamespace(encode=lambda name, messages: [1] * len(str(messages)))
        self.answering: set[str] = set()

    def longest_prompt(self, name: str, max_new_tokens: int) -> int:
        return 300

    async def stream(self, engine: object, request: answers.AnswerRequest) -> AsyncIterator[Piece]:
        if request.name == "broken":
            raise UserError("It is out of order.")
        self.answering.add(request.name)
        try:
            for number in range(request.settings.max_new_tokens if request.name != "silent" else 0):
                yield Piece(request.name[number % len(request.name)], number + 1)
                await asyncio.sleep(0.01)
        finally:
            self.answering.discard(request.name)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    made = EchoEngine()
    monkeypatch.setattr(answers, "stream_text", made.stream)
    return made


@pytest.fixture
def context(engine: EchoEngine, tmp_path: Path) -> Context:
    model_args = ModelArguments(model_name_or_path="base")
    object.__setattr__(model_args, "given", {"model_name_or_path": "base", "quantization_bit": 4})
    return Context(engine, model_args, {"ads": "output/ads"}, tmp_path, Trainings(tmp_path))


@pytest.fixture
def warm_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page starts its commands in processes that need no imports."""
    monkeypatch.setattr(commands.sys, "executable", warm_python())


# Flags


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-machine"])
def test_another_host_needs_a_password(host, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", "base", "--host", host]
    with pytest.raises(UserError, match=f"--host {host} can be reached from other machines, and there is no password"):
        parse_web_arguments(flags)
    secret = tmp_path / "secret"
    secret.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        parse_web_arguments([*flags, "--password_file", str(secret)])
    secret.write_text("open sesame\n")
    assert parse_web_arguments([*flags, "--password_file", str(secret)])[1].password == "open sesame"
    monkeypatch.setenv("GLM_PEFT_PASSWORD", "another")
    assert parse_web_arguments(flags)[1].password == "another"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--host 0.0.0.0", "--host 0.0.0.0 can be reached from other machines"),
        ("--port {taken}", "--port {taken} of 127.0.0.1 is in use: end what listens there, or give another one."),
        ("--adapters ads", "--adapters ads: give each adapter as name=PATH"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_before_anything_is_loaded(flags, words, tmp_path):
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = {"taken": taken.getsockname()[1]}
    typed = f"-m glm_peft.web --model_name_or_path nowhere --output_dir {tmp_path} {flags.format(**port)}"
    run = subprocess.run([warm_python(), *typed.split()], env=ENVIRONMENT, capture_output=True, encoding="utf-8")
    taken.close()
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert words.format(**port) in line


# Compare


def ask(engine: EchoEngine, names: list[str], question: str = "?", looks: int = 1000, tokens: int = 5) -> Round:
    async def run() -> None:
        seen = 0
        asking = asked.ask(question)
        async for _ in asking:
            seen += 1
            if seen == looks:
                await asking.aclose()

    asked = Round(engine, {name: Dialogue() for name in names}, GenerationSettings(max_new_tokens=tokens))
    asyncio.run(run())
    return asked


def texts_of(asked: Round) -> dict[str, list[str]]:
    return {name: [message["content"] for message in one.messages] for name, one in asked.dialogues.items()}


def test_all_answer_at_once_and_the_question_is_taken_back_where_there_is_no_answer(engine):
    asked = ask(engine, ["base", "ads", "broken", "silent"])
    assert texts_of(asked) == {"base": ["?", "baseb"], "ads": ["?", "adsad"], "broken": [], "silent": []}
    assert (asked.faults, asked.silent) == ({"broken": "It is out of order."}, ["silent"])
    too_long = ask(engine, ["base"], "?" * 400)
    assert "This question takes" in too_long.faults["base"] and texts_of(too_long) == {"base": []}


def test_a_stopped_answer_keeps_what_was_shown_and_frees_its_place(engine):
    asked = ask(engine, ["base", "ads"], looks=1, tokens=10_000)
    assert all(1 < len(answer) < 100 for _, answer in texts_of(asked).values())
    assert engine.answering == set()


def test_a_thumb_pairs_an_answer_with_those_beside_it():
    dialogues = {name: Dialogue("system") for name in ("base", "ads", "same", "behind")}
    for name, dialogue in dialogues.items():
        for content in ("one", "1", "two", "good" if name in ("ads", "same") else "bad")[
            : 2 if name == "behind" else 4
        ]:
            dialogue.add("assistant" if len(dialogue.messages) % 2 else "user", content)
    (pair,) = find_pairs(dialogues, "ads", 3, True)
    assert [message["content"] for message in pair.pop("prompt")] == ["system", "one", "1", "two"]
    answer = {"role": "assistant"}
    assert pair == {
        "chosen": [answer | {"content": "good"}],
        "rejected": [answer | {"content": "bad"}],
        "names": {"chosen": "ads", "rejected": "base"},
    }
    assert find_pairs(dialogues, "base", 3, False) == find_pairs(dialogues, "ads", 3, True) + find_pairs(
        dialogues, "same", 3, True
    )
    assert find_pairs(dialogues, "behind", 1, True) == []


def test_an_answer_that_looks_like_html_is_shown_as_text(context):
    with gr.Blocks():
        tab = CompareTab(context)
    dialogue = Dialogue(messages=[{"role": "assistant", "content": "<img src=x>&lt;"}])
    assert tab.show({"base": dialogue})[0][0]["content"] == "&lt;img src=x&gt;&amp;lt;"
    with pytest.raises(gr.Error) as told_error, told():
        raise UserError("--adapters <b>")
    assert told_error.value.message == "--adapters &lt;b&gt;"


# Data


def test_lengths_are_whole_and_the_example_is_marked_as_it_is_trained():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    answering = Answering(None, tokenizer, get_chat_format(tokenizer))
    flags = ["--model_name_or_path", str(ASSETS), "--train_file", str(ROWS), "--max_target_length", "10"]
    (prompts, answers_), spans = measure_file(flags, answering)
    assert len(prompts) == len(answers_) == 200 and min(answers_) > 10
    row = (
        json.loads(ROWS.read_text().splitlines()[0]) if ROWS.read_text()[0] == "{" else json.loads(ROWS.read_text())[0]
    )
    assert [carries_loss for _, carries_loss in spans] == [False, True]
    assert row["content"] in spans[0][0] and row["summary"].startswith(spans[1][0].removesuffix("<eop>"))
    with pytest.raises(UserError, match="No closing quotation"):
        split_flags('--source_prefix "x')


def test_a_command_is_read_while_it_runs_and_its_mistakes_are_its_own_sentence(warm_commands):
    async def run(*words: str) -> list[str]:
        return [said async for said in run_command(words)]

    assert asyncio.run(run("doctor", "--help"))[-1].startswith("usage: ")
    with pytest.raises(UserError, match="^There is nothing to examine"):
        asyncio.run(run("doctor", "--model_name_or_path", str(ASSETS)))


# Train


def test_the_command_has_what_differs_from_the_recipe(monkeypatch):
    monkeypatch.chdir(PROJECT)
    assert "configs/demo.yaml" in find_recipes() and "configs/search_space.yaml" not in find_recipes()
    given = dict.fromkeys(FLAGS, "") | {"learning_rate": "0.1", "num_virtual_tokens": "8", "num_train_epochs": "2"}
    base = ["--model_name_or_path", "base"]
    words = train_words(base, "configs/demo.yaml", given, ["--logging_steps", "1"])
    assert " ".join(words) == (
        "train configs/demo.yaml --model_name_or_path base --num_virtual_tokens 8 --num_train_epochs 2 --max_steps -1 "
        "--logging_steps 1"
    )
    assert train_words(base, "", given, [])[:4] == ["train", "--do_train", *base]


def test_a_log_tells_how_far_a_run_is():
    progress = read_progress(LOG)
    assert (progress.step, progress.steps) == (23, 1000)
    assert [(point["step"], point.get("loss"), point.get("eval_loss")) for point in progress.points] == [
        (10, 0.5, None),
        (20, None, 0.4),
    ]
    assert read_progress("loading").steps == 0
    assert " 0/1000" not in shorten_log(LOG) and "\x1b" not in shorten_log(LOG) and "10/1000" in shorten_log(LOG)
    assert has_finished(f"{LOG}results: output\n") and not has_finished(f"{LOG}\n  results: output\n")
    assert was_stopped(f"{LOG}stopped by SIGINT at step 3; go on\n") and not was_stopped(LOG)


def test_a_training_outlives_who_started_it_and_stops_with_a_checkpoint(tmp_path, warm_commands):
    output_dir = tmp_path / "out"
    flags = f"--model_name_or_path {ASSETS} --train_file {ROWS} --max_steps 5000 --num_virtual_tokens 2"
    words = ["train", "--do_train", *flags.split(), "--output_dir", str(output_dir), "--use_cpu", "true"]
    Trainings(tmp_path).start(words, str(output_dir))
    again = Trainings(tmp_path)  # as after another start of the page
    with pytest.raises(UserError, match="is running: wait for its end, or stop it"):
        again.start(words, str(output_dir))
    wait_for(lambda: read_progress(again.last.log).step > 0)
    again.stop()
    wait_for(lambda: again.last.process is None)
    assert was_stopped(again.last.log) and list(output_dir.glob("checkpoint-*"))


def wait_for(holds: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


# Adapter


def test_the_card_is_in_the_browsers_language(context, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained(tmp_path / "prefix")
    context.adapters["mine"] = str(tmp_path / "prefix")
    with gr.Blocks():
        tab = AdapterTab(context)
    assert "## Limits" in tab.show_card("mine", ENGLISH)[0] and "## 局限" in tab.show_card("mine", CHINESE)[0]
    for name, words in (("nobody", "nobody"), (None, "There is no adapter yet")):
        with pytest.raises(gr.Error) as error:
            tab.show_card(name, ENGLISH)
        assert words in error.value.message


# Words


def test_everything_is_said_in_both_languages():
    assert _ENGLISH.keys() == _CHINESE.keys()
    assert say(ENGLISH, "running", step=1, steps=2) == "Step 1 of 2" and say(CHINESE, "no_file") == "请先选择文件。"


# What the server gives to whom


@pytest.fixture
def client(context: Context, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(context.folder / "files"))
    application = make_application(build_page(context), "open sesame")
    with TestClient(application, base_url="http://127.0.0.1:7860") as made:
        yield made


def test_a_password_lets_in_and_no_files_are_served_but_its_own(client, context, tmp_path_factory):
    foreign, own = tmp_path_factory.mktemp("elsewhere") / "secret.txt", context.folder / "files" / "rows.jsonl"
    for file in (foreign, own, context.folder / "training.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("text")
    assert client.get("/config").status_code == 401 and client.get(f"/gradio_api/file={own}").status_code == 401
    assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
    assert client.post("/login", data={"username": "me", "password": "open sesame"}).status_code == 200
    assert client.get(f"/gradio_api/file={own}").text == "text"
    for path in (foreign, PROJECT / "setup.cfg", "/etc/passwd", f"{context.folder}/files/../training.json"):
        assert client.get(f"/gradio_api/file={path}").status_code == 403
    assert client.get("/gradio_api/file=http://127.0.0.1/").status_code == 403
    # Nor may one be named as an upload, which would be read and then served.
    config, foreign_rows = client.get("/config").json(), tmp_path_factory.mktemp("rows") / "rows.json"
    foreign_rows.write_text("[]")
    kinds = {component["id"]: component["type"] for component in config["components"]}
    (take,) = [one["id"] for one in config["dependencies"] if [kinds[part] for part in one["inputs"]] == ["file"]]
    named = {"path": str(foreign_rows), "meta": {"_type": "gradio.FileData"}}
    call = {"data": [named], "fn_index": take, "session_hash": "x"}
    assert "was not uploaded" in client.post("/gradio_api/run/predict", json=call).text
    assert not list((context.folder / "files").rglob("rows.json"))
    uploaded = client.post("/gradio_api/upload", files={"files": ("rows.json", b"[]")}).json()[0]
    assert Path(uploaded).is_relative_to(context.folder / "files")


def test_pages_of_others_are_refused_and_the_browser_is_told_to_ask_nobody_else(client, context):
    answer = client.get("/", headers={"Origin": "http://127.0.0.1:7860"})
    assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith("default-src 'self' ")
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    application = make_application(build_page(context), None)
    with TestClient(application, base_url="http://localhost:7860") as open_client:
        assert open_client.get("/config").json()["analytics_enabled"] is False
        assert open_client.get("/", headers={"Host": "evil.example:7860"}).status_code == 403
