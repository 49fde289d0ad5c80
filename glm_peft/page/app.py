"""The page as a whole: its tabs, and the application that serves it to nobody but its user."""

import hmac
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from glm_peft.arguments.address import is_loopback
from glm_peft.arguments.model import ModelArguments
from glm_peft.page.adapter_tab import AdapterTab
from glm_peft.page.compare import FILES, CompareTab
from glm_peft.page.context import Context
from glm_peft.page.data_tab import DataTab
from glm_peft.page.train_tab import TrainTab, find_recipes
from glm_peft.page.trainings import Trainings
from glm_peft.page.words import TEXT
from glm_peft.serving.engine import Engine

# In the head, as Gradio would confine it to what is below the tabs.
_STYLE = Path(__file__).with_name("page.css")
_SHUTDOWN = 1  # seconds that open pages are waited for
_MOST_BYTES = "500mb"  # of an upload
# Whatever a card or an answer names, the browser asks nobody but this page.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_FETCHES = ("/gradio_api/file=http", "/gradio_api/proxy=")  # by which Gradio gets what lies elsewhere


def make_server(
    engine: Engine, model_args: ModelArguments, adapters: dict[str, str], folder: Path, password: str | None
) -> uvicorn.Server:
    """
    Return the server of the page.

    Args:
        model_args: those of the base.
        adapters: folder or Hub id of each adapter by its name.
        folder: for what the page writes.
        password: that lets a browser in; `None` for none.
    """
    # Uploads and downloads lie in a folder of their own, which other programs of Gradio do not share.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "files"), "GRADIO_ANALYTICS_ENABLED": "False"}
    page = build_page(Context(engine, model_args, adapters, folder, Trainings(folder)))
    application = make_application(page, password, [folder / name for name in FILES])
    return uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=_SHUTDOWN))


def build_page(context: Context) -> gr.Blocks:
    """Put the four tabs together."""
    with gr.Blocks(title="glm_peft", analytics_enabled=False, fill_width=True) as page:
        with gr.Tabs() as tabs:
            with gr.Tab(TEXT("compare"), id="compare", elem_id="tab-compare"):
                compare = CompareTab(context)
            with gr.Tab(TEXT("data"), id="data", elem_id="tab-data"):
                data = DataTab(context)
            with gr.Tab(TEXT("train"), id="train", elem_id="tab-train"):
                train = TrainTab(context, find_recipes(), compare)
            with gr.Tab(TEXT("adapter"), id="adapter", elem_id="tab-adapter"):
                adapter = AdapterTab(context)
        # Who answers and what runs is of the server: a page that is opened again shows it as it is.
        page.load(compare.refresh, None, compare.frames, show_progress="hidden")
        page.load(compare.find_files, None, compare.files, show_progress="hidden")
        page.load(train.show, None, train.shown, show_progress="hidden")
        page.load(adapter.refresh, None, adapter.which, show_progress="hidden")
        data.file.upload(lambda file: file, data.file, train.fields["train_file"], show_progress="hidden")
        # What was just trained is shown where it answers.
        train.added.success(lambda: gr.Tabs(selected="compare"), None, tabs, show_progress="hidden")
        train.added.success(adapter.refresh, None, adapter.which, show_progress="hidden")
    return page


def make_application(page: gr.Blocks, password: str | None, files: Sequence[Path] = ()) -> FastAPI:
    """
    Return the application that serves the page.

    Args:
        password: that must be given with any name; `None` for none.
        files: that may be downloaded beside what was uploaded.
    """
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    application.middleware("http")(partial(_guard, password is None))
    page.has_launched = True  # or a browser may name any file of this machine as one that it has uploaded
    return gr.mount_gradio_app(
        application,
        page,
        path="/",
        auth=_checker(password) if password else None,
        auth_message="Any user name · 用户名可任意填写",
        allowed_paths=[str(file) for file in files],
        max_file_size=_MOST_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        i18n=TEXT,
        theme=_make_theme(),
        head=f"<style>{_STYLE.read_text(encoding='utf-8')}</style>",
    )


async def _guard(is_open: bool, request: Request, call_next: Any) -> Response:
    """Refuse what pages of other sites send, and what would reach beyond this one."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    # A name of theirs may lead here, too: without a password only this machine's own are answered.
    is_foreign = is_open and not is_loopback(urlsplit(f"//{host}").hostname or "")
    if is_foreign or (origin and urlsplit(origin).netloc != host):
        return PlainTextResponse("This page answers its own requests only.", 403)
    if request.url.path.startswith(_FETCHES):
        return PlainTextResponse("This page serves its own files only.", 403)
    response = await call_next(request)
    response.headers["Content-Security-Policy"] = _POLICY
    return response


def _checker(password: str) -> Any:
    def is_right(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), password.encode())

    return is_right


def _make_theme() -> gr.Theme:
    # Fonts of the machine that shows the page: Gradio's own would have no Chinese.
    fonts = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
    return gr.themes.Soft(
        primary_hue="blue", font=fonts, font_mono=["ui-monospace", "Noto Sans Mono CJK SC", "monospace"]
    )
