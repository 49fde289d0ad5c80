"""The tab that examines a file of data: the doctor's report, the lengths as a picture, the first example."""

import shlex
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from typing import Any

import gradio as gr
import pandas

from glm_peft.arguments.doctor import parse_doctor_arguments
from glm_peft.data import build_training_features
from glm_peft.errors import UserError
from glm_peft.page.commands import run_command
from glm_peft.page.context import Context, told
from glm_peft.page.words import TEXT, say
from glm_peft.prediction.evaluation import Answering
from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.preprocessing.lengths import measure_lengths
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.serving.answerers import BASE

DATA_TYPES = [".json", ".jsonl", ".csv", ".parquet"]

_MOST_ROWS = 2000  # of the picture, which is to be there at once
_UNLIMITED = 1 << 30
_BINS = 24

Spans = list[tuple[str, bool]]


class DataTab:
    """An upload, and what is found in it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.file = gr.File(label=TEXT("data_file"), height=180, file_types=DATA_TYPES, elem_id="data-file")
                self.flags = gr.Textbox("", label=TEXT("further_flags"), info=TEXT("data_flags_hint"))
                self.button = gr.Button(TEXT("examine"), variant="primary", elem_id="examine")
            with gr.Column(scale=3, min_width=280):
                axes = {"x": "tokens", "y": "texts", "color": "of", "show_label": False, "height": 360}
                self.lengths = gr.BarPlot(elem_id="lengths", **axes)
        self.example = gr.HighlightedText(
            label=TEXT("example"), show_inline_category=False, show_legend=True, elem_id="example"
        )
        self.report = gr.Textbox(
            label=TEXT("report"),
            placeholder=TEXT("report_hint"),
            lines=6,
            max_lines=40,
            interactive=False,
            autoscroll=False,
            elem_classes="console",
            elem_id="report",
        )
        shown = [self.lengths, self.example, self.report]
        gr.on(
            [self.button.click, self.file.upload], self.examine, [self.file, self.flags], shown, show_progress="hidden"
        )

    async def examine(self, file: str | None, flags: str, request: gr.Request) -> AsyncIterator[list[Any]]:
        """Show the lengths and the first example at once, then the doctor's report while it is written."""
        with told():
            if not file:
                raise UserError(say(request, "no_file"))
            words = [*self.context.base_flags, "--train_file", file, *split_flags(flags)]
            picture, spans = None, None
            yield [picture, spans, say(request, "examining")]
            with suppress(UserError):  # the doctor says what is wrong, and of all rows
                lengths, example = measure_file(words, self.context.engine.answerers.by_name[BASE])
                picture, spans = _draw(lengths, request), _mark(example, request)
            yield [picture, spans, say(request, "examining")]
            async for report in run_command(["doctor", *words]):
                yield [gr.skip(), gr.skip(), report.strip()]


def split_flags(flags: str) -> list[str]:
    """
    Split flags as a shell does.

    Raises:
        UserError: a quotation mark has no end.
    """
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"{flags}: these flags cannot be read ({error}).") from error


def measure_file(words: list[str], answering: Answering) -> tuple[list[list[int]], Spans]:
    """
    Measure the first rows of a file in tokens, and decode its first example.

    Args:
        words: flags of the doctor.

    Returns:
        the lengths of prompts and of answers, and the example's texts with whether they carry loss.

    Raises:
        UserError: the flags are wrong, or the file has no row that can be used.
    """
    data_args = parse_doctor_arguments(words).data
    most = min(data_args.max_train_samples or _MOST_ROWS, _MOST_ROWS)
    data_args = replace(data_args, max_train_samples=most, skip_bad_rows=True)
    split = load_splits(data_args, ["train"])["train"]
    # Encoded without limits, as a text that was cut does not tell how long it was.
    unlimited = replace(data_args, max_source_length=_UNLIMITED, max_target_length=_UNLIMITED)
    encode = [split, answering.chat_format, answering.tokenizer]
    lengths = measure_lengths(build_training_features(*encode, unlimited)[0])
    first = build_training_features(replace(split, conversations=split.conversations[:1]), *encode[1:], data_args)
    row = first[0][0]
    marked = zip(row["input_ids"], [label != IGNORED_LABEL for label in row["labels"]], strict=True)
    groups = [(carries_loss, [one for one, _ in group]) for carries_loss, group in groupby(marked, lambda one: one[1])]
    return lengths, [(answering.tokenizer.decode(ids), carries_loss) for carries_loss, ids in groups]


def _draw(lengths: list[list[int]], request: gr.Request) -> Any:
    names = [say(request, name) for name in ("prompts", "answers")]
    rows = [
        {"tokens": length, "texts": count, "of": name}
        for name, values in zip(names, lengths, strict=True)
        for length, count in Counter(values).items()
    ]
    width = max(max(map(max, lengths)) // _BINS, 1)
    titles = {"title": say(request, "lengths"), "x_title": say(request, "tokens"), "y_title": say(request, "texts")}
    bins = {"x_bin": width, "y_aggregate": "sum", "x_axis_format": "d"}
    return gr.BarPlot(value=pandas.DataFrame(rows), color_title=" ", **bins, **titles)


def _mark(example: Spans, request: gr.Request) -> list[tuple[str, str | None]]:
    return [(text, say(request, "carries_loss") if carries_loss else None) for text, carries_loss in example]
