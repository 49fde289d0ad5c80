"""The tab that trains: the command and its flags, its log, its progress, its curves."""

import html
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

from glm_peft.arguments.settings import read_config
from glm_peft.errors import UserError
from glm_peft.page.commands import last_line
from glm_peft.page.compare import CompareTab
from glm_peft.page.context import Context, note, told
from glm_peft.page.data_tab import split_flags
from glm_peft.page.trainings import LOG_LINES, Progress, has_finished, read_progress, shorten_log, was_stopped
from glm_peft.page.words import TEXT, say

_TICK = 1.0  # seconds
_FIELDS = (
    ("train_file", "output_dir"),
    ("num_virtual_tokens", "learning_rate", "per_device_train_batch_size"),
    ("max_steps", "num_train_epochs", "max_source_length", "max_target_length"),
)
_PLOTS = ("loss-curve", "rate-curve")
FLAGS = tuple(flag for row in _FIELDS for flag in row)
"""The flags that have a field."""


class TrainTab:
    """A form that becomes a command, and what is known of the run that was started last."""

    def __init__(self, context: Context, recipes: list[str], compare: CompareTab) -> None:
        self.context, self.compare = context, compare
        self._make_form(recipes)
        self.timer = gr.Timer(_TICK, active=False)
        with gr.Row():
            self.start_button = gr.Button(TEXT("start"), variant="primary", elem_id="start")
            self.stop_button = gr.Button(TEXT("stop_training"), variant="stop", elem_id="stop-training")
        self.status = gr.HTML(elem_id="status")
        with gr.Row(visible=False) as self.result:
            self.name = gr.Textbox("trained", label=TEXT("adapter_name"), elem_id="adapter-name")
            self.add_button = gr.Button(TEXT("add"), variant="primary", elem_id="add")
        with gr.Column(visible=False) as self.report:
            with gr.Row():
                axes = {"x": "step", "y": "value", "color": "curve", "x_axis_format": "d"}
                size = {"height": 280, "min_width": 280, "show_label": False}
                self.loss, self.rate = (gr.LinePlot(elem_id=name, **axes, **size) for name in _PLOTS)
            self.log = gr.Textbox(
                label=TEXT("log"), lines=LOG_LINES, max_lines=LOG_LINES, elem_classes="console", elem_id="log"
            )
        self.shown = [self.status, self.report, self.loss, self.rate, self.log, self.result, self.timer]
        self._connect()

    def _make_form(self, recipes: list[str]) -> None:
        choices = [(TEXT("no_recipe"), ""), *[(recipe, recipe) for recipe in recipes]]
        self.recipe = gr.Dropdown(choices, value="", label=TEXT("recipe"), info=TEXT("recipe_hint"), elem_id="recipe")
        self.fields = {}
        for row in _FIELDS:
            with gr.Row():
                for flag in row:
                    # As text, which the command itself checks: so 5e-3 stays as it was written.
                    settings = {"label": TEXT(flag), "info": f"--{flag}", "elem_id": f"flag-{flag}"}
                    self.fields[flag] = gr.Textbox("", min_width=160, **settings)
        self.flags = gr.Textbox("", label=TEXT("further_flags"), info=TEXT("train_flags_hint"), elem_id="train-flags")
        self.command = gr.Textbox(
            label=TEXT("command"),
            lines=3,
            interactive=False,
            buttons=["copy"],
            elem_classes="command",
            elem_id="command",
        )

    def _connect(self) -> None:
        form = [self.recipe, self.flags, *self.fields.values()]
        quiet = {"show_progress": "hidden"}
        self.recipe.input(self.fill_in, self.recipe, list(self.fields.values()), **quiet)
        gr.on([part.change for part in form], self.show_command, form, self.command, **quiet)
        self.start_button.click(self.start, form, self.shown, **quiet)
        self.stop_button.click(self.stop, None, self.shown, **quiet)
        self.timer.tick(self.show, None, self.shown, **quiet)
        self.added = self.add_button.click(self.add, self.name, self.compare.frames, **quiet)

    def fill_in(self, recipe: str) -> list[str]:
        """Return what a recipe says of each field."""
        with told():
            settings = _read(recipe)
        return [settings.get(flag, "") for flag in FLAGS]

    def show_command(self, recipe: str, flags: str, *values: str) -> str:
        """Return the command as it can be typed."""
        try:
            return shlex.join(["python", "-m", "glm_peft", *self._words(recipe, flags, values)])
        except UserError:
            return ""  # while it is written; a click tells

    def start(self, request: gr.Request, recipe: str, flags: str, *values: str) -> list[Any]:
        """Start the command, unless one is running."""
        with told():
            output_dir = dict(zip(FLAGS, values, strict=True))["output_dir"].strip()
            if not output_dir:
                raise UserError(say(request, "no_output_dir"))
            self.context.trainings.start(self._words(recipe, flags, values), output_dir)
        return self.show(request)

    def stop(self, request: gr.Request) -> list[Any]:
        """Let the run write its checkpoint and end."""
        self.context.trainings.stop()
        return self.show(request)

    def show(self, request: gr.Request) -> list[Any]:
        """Return how far the run is, for `shown`."""
        run = self.context.trainings.last
        if run is None:
            return [_bar(say(request, "idle"))] + [gr.skip()] * 5 + [gr.Timer(active=False)]
        is_running = run.process is not None  # before the log, of which the end would be missing otherwise
        log = run.log
        progress = read_progress(log)
        if is_running:
            told_state = _describe(progress, request)
        elif was_stopped(log):
            told_state = say(request, "stopped")
        elif has_finished(log):
            told_state = say(request, "finished", folder=run.output_dir)
        else:
            told_state = say(request, "failed", reason=last_line(log))
        return [
            _bar(told_state, progress),
            gr.Column(visible=True),
            _draw(progress, "loss", {"loss": "training", "eval_loss": "evaluation"}, request),
            _draw(progress, "learning_rate", {"learning_rate": "training"}, request),
            shorten_log(log),
            gr.Row(visible=not is_running and has_finished(log)),
            gr.Timer(active=is_running),
        ]

    def add(self, name: str, request: gr.Request) -> list[Any]:
        """Let what was trained answer, in a column of its own."""
        with told():
            if len(self.context.names) == len(self.compare.columns):
                raise UserError(say(request, "no_place"))
            path = self.context.trainings.last.output_dir
            self.context.engine.add_adapter(name.strip(), path)
            self.context.adapters[name.strip()] = path
        note(say(request, "added", name=name.strip()))
        return self.compare.refresh()

    def _words(self, recipe: str, flags: str, values: tuple[str, ...]) -> list[str]:
        given = dict(zip(FLAGS, (value.strip() for value in values), strict=True))
        return train_words(self.context.base_flags, recipe, given, split_flags(flags))


def train_words(base_flags: list[str], recipe: str, given: Mapping[str, str], further: list[str]) -> list[str]:
    """
    Return the words of the command that trains.

    Args:
        base_flags: of the base that the page shows.
        recipe: a configuration file; empty for none.
        given: values of `FLAGS`; empty ones are left to the recipe and the defaults.
        further: flags as they are typed.
    """
    settings = _read(recipe)
    start = ["train", recipe] if recipe else ["train", "--do_train"]
    changed = {flag: value for flag, value in given.items() if value and value != settings.get(flag)}
    if "num_train_epochs" in changed and not given["max_steps"] and "max_steps" in settings:
        changed["max_steps"] = "-1"  # which would win over the epochs
    words = [word for flag, value in changed.items() for word in (f"--{flag}", value)]
    return [*start, *base_flags, *words, *further]


def find_recipes(folder: Path = Path("configs")) -> list[str]:
    """Return the configuration files in a folder that train."""
    return [str(path) for path in sorted(folder.glob("*.yaml")) if "do_train" in _read(str(path))]


def _read(recipe: str) -> dict[str, str]:
    return {setting.name: " ".join(setting.values) for setting in read_config(recipe)} if recipe else {}


def _describe(progress: Progress, request: gr.Request) -> str:
    if not progress.steps:
        return say(request, "loading")
    return say(request, "running", step=progress.step, steps=progress.steps)


def _bar(text: str, progress: Progress | None = None) -> str:
    bar = (
        f'<progress value="{progress.step}" max="{progress.steps}"></progress>' if progress and progress.steps else ""
    )
    return f"{bar}<p>{html.escape(text)}</p>"


def _draw(progress: Progress, title: str, curves: Mapping[str, str], request: gr.Request) -> Any:
    rows = [
        {"step": point["step"], "value": point[key], "curve": say(request, name)}
        for point in progress.points
        for key, name in curves.items()
        if key in point
    ]
    titles = {"title": say(request, title), "x_title": say(request, "step"), "y_title": " ", "color_title": " "}
    return gr.LinePlot(value=pandas.DataFrame(rows) if rows else None, visible=bool(rows), **titles)
