"""The page in a real browser, by clicking as a person would; one server and one browser for the whole file."""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft import PrefixTuningConfig, get_peft_model
from playwright.sync_api import Browser, Page, expect, sync_playwright
from transformers import AutoModelForCausalLM
from warm_starts import ENVIRONMENT, warm_python

import glm_peft  # noqa: F401  (registers the generations)

PROJECT = Path(__file__).parents[1]
ASSETS, ROWS = PROJECT / "glm_peft" / "assets", PROJECT / "examples" / "demo" / "train.json"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="There is no Chromium on this machine: install chromium.")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]
# As `python -m glm_peft.web`, but the commands that the page starts need no imports either.
START = "import sys; sys.executable = sys.argv.pop(1); from glm_peft.web import main; main()"
QUESTION = "类型#裤*材质#雪纺*颜色#黑色*风格#复古*图案#波点*裤型#直筒裤"
SOON = 90_000  # milliseconds
expect.set_options(timeout=SOON)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page writes; beside it is an adapter."""
    made = tmp_path_factory.mktemp("page")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(ASSETS), config)
    model.prompt_encoder.default.embedding.weight.data.mul_(8)  # to answer otherwise than the base
    model.save_pretrained(made / "adapter")
    return made / "web"


@contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The page's process and its address."""
    flags = ["--model_name_or_path", ASSETS, "--adapters", f"fresh={folder.parent / 'adapter'}"]
    typed = [warm_python(), "-c", START, warm_python(), *flags, "--port", "0", "--output_dir", folder]
    with (
        (folder.parent / "log").open("a") as log,
        subprocess.Popen(
            typed, cwd=PROJECT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, encoding="utf-8"
        ) as process,
    ):
        try:
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of the page that all but one test share."""
    with running(folder) as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture
def english(browser: Browser, address: str) -> Iterator[Page]:
    yield from open_page(browser, address, "en-US")


@pytest.fixture
def chinese(browser: Browser, address: str) -> Iterator[Page]:
    yield from open_page(browser, address, "zh-CN")


def open_page(browser: Browser, address: str, locale: str) -> Iterator[Page]:
    """A page of its own, which asks nobody but its server and has no error of its own."""
    context = browser.new_context(locale=locale)
    asked, errors = [], []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_role("tab").first.wait_for()
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == [] and errors == []


def answers_of(page: Page) -> list[str]:
    return page.locator(".answers .bot").all_inner_texts()


def ask(page: Page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


def wait_for_end(page: Page) -> None:
    """Nothing has come for a while."""
    before = None
    while before != (before := answers_of(page)) or not before:
        time.sleep(0.7)


def said_at_last(page: Page, words: str) -> None:
    """A message of the page says this, and is closed."""
    message = page.get_by_test_id("toast-body").filter(has_text=words)
    expect(message).to_be_visible()
    message.get_by_test_id("toast-close").click()
    expect(message).to_have_count(0)


@needs_browser
def test_answers_grow_side_by_side_and_are_kept(english, folder):
    seen = set()
    ask(english, f"<img src=x>{QUESTION}")
    while len(seen) < 4:
        seen.add(tuple(map(len, answers_of(english))))
        time.sleep(0.05)
    english.locator("#stop").click()
    wait_for_end(english)
    assert max(seen) > min(seen) and english.locator(".answers img").count() == 0
    expect(english.locator(".answers .user").first).to_contain_text("<img src=x>")
    english.locator("#clear").click()
    expect(english.locator(".answers .message")).to_have_count(0)

    ask(english, QUESTION)
    wait_for_end(english)
    english.locator(".answers").nth(1).get_by_label("Like", exact=True).click()
    said_at_last(english, "preferences.jsonl: 1 pair")
    english.locator(".save:visible").nth(1).click()
    said_at_last(english, "Saved as a row")
    with english.expect_download() as download:
        english.locator("#conversations").click()
    row = json.loads(Path(download.value.path()).read_text())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"] == answers_of(english)[1]
    (pair,) = map(json.loads, (folder / "preferences.jsonl").read_text().splitlines())
    assert pair["chosen"] == row["messages"][1:] and pair["names"] == {"chosen": "fresh", "rejected": "base"}


@needs_browser
def test_an_upload_is_examined(chinese):
    chinese.get_by_role("tab", name="数据").click()
    chinese.locator("#examine").click()
    said_at_last(chinese, "请先选择文件。")
    chinese.locator("#data-file input[type=file]").set_input_files(ROWS)
    expect(chinese.locator("#lengths svg.marks")).to_be_visible()
    expect(chinese.locator("#example")).to_contain_text("计入损失")
    expect(chinese.locator("#report textarea")).to_have_value(re.compile(r"Training can start\."))


@needs_browser
def test_a_training_outlives_its_page_and_answers_at_its_end(browser, address, english, folder):
    english.get_by_role("tab", name="Train").click()
    english.locator("#start").click()
    said_at_last(english, "Name an output folder first.")
    english.locator("#recipe input").click()
    english.get_by_role("option", name="configs/demo.yaml").click()
    expect(english.locator("#flag-learning_rate textarea")).to_have_value("0.1")
    filled = {"output_dir": str(folder.parent / "trained"), "max_steps": "60", "per_device_train_batch_size": "2"}
    for flag, value in filled.items():
        english.locator(f"#flag-{flag} textarea").fill(value)
    english.locator("#train-flags textarea").fill("--do_eval false --eval_strategy no --use_cpu true")
    expect(english.locator("#command textarea")).to_have_value(re.compile(r"--max_steps 60"))
    english.locator("#start").click()
    expect(english.locator("#status progress")).to_be_visible()
    english.close()

    for page in open_page(browser, address, "zh-CN"):
        page.get_by_role("tab", name="训练").click()
        expect(page.locator("#status")).to_contain_text("/ 60 步")
        expect(page.locator("#loss-curve svg.marks")).to_be_visible()
        expect(page.locator("#status")).to_contain_text("训练完成")
        page.locator("#add").click()
        said_at_last(page, "trained 已可回答。")
        ask(page, QUESTION)
        expect(page.locator(".answers .bot")).to_have_count(3)


@needs_browser
def test_an_adapter_is_inspected(english):
    english.get_by_role("tab", name="Adapter").click()
    expect(english.locator("#card")).to_contain_text("virtual tokens")
    english.locator("#inspect").click()
    expect(english.locator("#norms svg.marks")).to_be_visible()
    expect(english.locator("#inspection textarea")).to_have_value(re.compile(r"keys_mean"))


def test_the_page_is_shown_until_it_is_ended(folder):  # one of its own: others may be used after it
    with running(folder) as (process, address):
        assert b"gradio_config" in urllib.request.urlopen(address).read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (130, 0)  # 0 where the tests are in the background of a shell, which ignores Ctrl-C
