"""The tab that shows what an adapter is: its card, and what the inspection measures."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gradio as gr
import pandas
import PIL.Image

from glm_peft.errors import UserError
from glm_peft.examination.adapter_statistics import KINDS
from glm_peft.examination.importance_plot import PLOT_NAME
from glm_peft.hub.download import fetch_adapter
from glm_peft.page.commands import run_command
from glm_peft.page.context import Context, told
from glm_peft.page.data_tab import DATA_TYPES
from glm_peft.page.words import TEXT, is_chinese, say
from glm_peft.publishing.card.build import build_card
from glm_peft.reporting.file_names import CURVES_NAME
from glm_peft.reporting.files import read_json

_INSPECTION_NAME = "inspection.json"
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")


class AdapterTab:
    """One adapter: its card, the norms by layer, and, with rows, what the base does with it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        with gr.Row():
            with gr.Column(min_width=300):
                choices = {"label": TEXT("which"), "info": TEXT("which_hint"), "allow_custom_value": True}
                self.which = gr.Dropdown([], elem_id="which", **choices)  # filled when a page is opened
                self.button = gr.Button(TEXT("inspect"), variant="primary", elem_id="inspect")
            with gr.Column(min_width=300):
                self.rows = gr.File(label=TEXT("rows"), file_types=DATA_TYPES, height=150, elem_id="inspect-rows")
        with gr.Row():
            with gr.Column(min_width=300):
                # Cards of others are never shown: this one is built from the adapter's record.
                self.card = gr.Markdown(container=True, max_height=900, elem_id="card", elem_classes="card")
            with gr.Column(min_width=300):
                pictures = {"visible": False, "show_label": False, "buttons": ["download", "fullscreen"]}
                self.curves = gr.Image(**pictures)
                axes = {"x": "layer", "y": "norm", "color": "of", "show_label": False, "height": 280}
                self.norms = gr.LinePlot(visible=False, elem_id="norms", **axes)
                self.picture = gr.Image(**pictures)
                self.report = gr.Textbox(
                    label=TEXT("inspection"),
                    lines=8,
                    max_lines=40,
                    interactive=False,
                    autoscroll=False,
                    elem_classes="console",
                    elem_id="inspection",
                )
        self.which.change(self.show_card, self.which, [self.card, self.curves], show_progress="hidden")
        shown = [self.report, self.norms, self.picture]
        self.button.click(self.inspect, [self.which, self.rows], shown, show_progress="hidden")

    def refresh(self) -> Any:
        """Return the adapters that there are to choose from."""
        names = list(self.context.adapters)
        return gr.Dropdown(choices=names, value=names[-1] if names else None)

    def show_card(self, name: str | None, request: gr.Request) -> list[Any]:
        """Return an adapter's card in the browser's language, and its curves."""
        with told():
            folder = fetch_adapter(self._path(name, request))
            card = build_card(folder, language="zh" if is_chinese(request) else "en")
        curves = Path(folder) / CURVES_NAME
        text = _IMAGE.sub("", card.split("\n---\n", 1)[-1])  # without its metadata, and what lies beside it
        return [text, _show_picture(curves)]

    async def inspect(self, name: str | None, rows: str | None, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show what the inspection says while it measures, then its pictures."""
        folder = Path(mkdtemp(dir=self.context.folder, prefix="inspection_"))
        with told():
            words = ["inspect_adapter", self._path(name, request), "--output_dir", str(folder)]
            words += ["--base", self.context.model_args.model_name_or_path]
            words += ["--test_file", rows] if rows else []
            yield [say(request, "inspecting"), gr.skip(), gr.Image(visible=False)]
            async for report in run_command(words):
                yield [report.strip(), gr.skip(), gr.skip()]
        yield [gr.skip(), _draw(read_json(folder / _INSPECTION_NAME), request), _show_picture(folder / PLOT_NAME)]

    def _path(self, name: str | None, request: gr.Request) -> str:
        if not name:
            raise UserError(say(request, "no_adapter"))
        return self.context.adapters.get(name, name)


def _show_picture(file: Path) -> gr.Image:
    # Not by its path, as files of other folders are not served.
    return gr.Image(PIL.Image.open(file), visible=True) if file.is_file() else gr.Image(visible=False)


def _draw(found: dict[str, Any], request: gr.Request) -> Any:
    layers = found.get("adapter", {}).get("norms", [])
    rows = [
        {"layer": str(number), "norm": layer[f"{kind}_mean"], "of": say(request, kind)}
        for number, layer in enumerate(layers)
        for kind in KINDS
    ]
    titles = {"title": say(request, "norms"), "x_title": say(request, "layer"), "y_title": " ", "color_title": " "}
    order = [str(number) for number in range(len(layers))]
    return gr.LinePlot(value=pandas.DataFrame(rows), visible=True, sort=order, **titles) if rows else gr.skip()
