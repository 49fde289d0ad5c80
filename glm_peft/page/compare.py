"""The tab that asks the base and every adapter the same question, side by side."""

import html
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message
from glm_peft.page.answers import Round, find_pairs
from glm_peft.page.context import Context, note, told, warn
from glm_peft.page.words import TEXT, say
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.dialogue import Dialogue, append_row

FILES = CONVERSATIONS_NAME, PREFERENCES_NAME = "conversations.jsonl", "preferences.jsonl"
"""What can be downloaded."""

_SPARE_COLUMNS = 4  # for adapters that are trained from the page
_HEIGHT = "clamp(280px, 56vh, 640px)"
_NARROWEST = 300  # pixels of a column: the next one goes below where less is left
_DEFAULTS = asdict(GenerationSettings(max_new_tokens=512))
_SAMPLING = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "seed")


@dataclass(frozen=True)
class Column:
    """What is shown of one who answers."""

    frame: gr.Column
    chat: gr.Chatbot
    save: gr.Button


class CompareTab:
    """Conversations that go on side by side, a column for each who answers; their state is of one open page."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.dialogues = gr.State({})
        with gr.Row():
            self.columns = [_make_column() for _ in range(len(context.names) + _SPARE_COLUMNS)]
        self.chats = [column.chat for column in self.columns]
        self.frames = [part for column in self.columns for part in (column.frame, column.chat)]
        with gr.Row(equal_height=True):
            hint = {"placeholder": TEXT("question_hint"), "show_label": False, "autofocus": True}
            self.question = gr.Textbox("", max_lines=8, scale=6, min_width=240, elem_id="question", **hint)
            self.ask_button = gr.Button(TEXT("ask"), variant="primary", min_width=80, elem_id="ask")
            self.stop_button = gr.Button(TEXT("stop"), variant="stop", min_width=80, elem_id="stop")
        with gr.Row():
            self.clear_button = gr.Button(TEXT("clear"), size="sm", elem_id="clear")
            self.files = [
                gr.DownloadButton(TEXT(name), visible=False, size="sm", elem_id=name)
                for name in ("conversations", "preferences")
            ]
        self.settings = _make_settings()
        self._connect()

    def _connect(self) -> None:
        inputs = [self.question, self.dialogues, *self.settings]
        asking = [self.ask_button.click, self.question.submit]
        asked = gr.on(
            asking, self.ask, inputs, [self.question, *self.chats], concurrency_limit=None, show_progress="hidden"
        )
        self.stop_button.click(None, cancels=[asked]).then(self.show, self.dialogues, self.chats)
        self.clear_button.click(self.clear, self.dialogues, self.chats, cancels=[asked])
        for number, column in enumerate(self.columns):
            inputs = [gr.State(number), self.dialogues]
            column.chat.like(self.prefer, inputs, self.files)
            column.chat.clear(self.forget, inputs)
            column.save.click(self.save, inputs, self.files, show_progress="hidden")

    def refresh(self) -> list[Any]:
        """Return who answers in which column, for `frames`."""
        names = self.context.names
        unused = len(self.columns) - len(names)
        shown = [part for name in names for part in (gr.Column(visible=True), gr.Chatbot(label=name))]
        return shown + [gr.Column(visible=False), gr.Chatbot()] * unused

    def find_files(self) -> list[Any]:
        """Return the files that there are, for `files`."""
        paths = [self.context.folder / name for name in FILES]
        return [gr.DownloadButton(value=str(path), visible=True) if path.is_file() else gr.skip() for path in paths]

    async def ask(
        self, request: gr.Request, question: str, dialogues: dict[str, Dialogue], system: str, *sampling: Any
    ) -> AsyncIterator[list[Any]]:
        """Ask all, and show their answers while they grow."""
        with told():
            if not question.strip():
                raise UserError(say(request, "empty_question"))
            settings = GenerationSettings(**dict(zip(_SAMPLING, sampling, strict=True)))
        for name in self.context.names:
            dialogues.setdefault(name, Dialogue()).system = system.strip() or None
        asked = Round(self.context.engine, dialogues, settings)
        async for _ in asked.ask(question):
            yield ["", *self.show(dialogues)]
        for name, fault in asked.faults.items():
            warn(f"{name}: {fault}")
        for name in asked.forgotten:
            warn(say(request, "forgotten", name=name, count=dialogues[name].forgotten))
        for name in asked.silent:
            warn(say(request, "no_answer", name=name))
        # A question that nobody took goes back to where it was written.
        yield [question if len(asked.faults) == len(dialogues) else "", *self.show(dialogues)]

    def show(self, dialogues: dict[str, Dialogue]) -> list[Any]:
        """Return what stands in each column."""
        shown = [_as_plain(dialogues.get(name, Dialogue())) for name in self.context.names]
        return shown + [[]] * (len(self.columns) - len(shown))

    def clear(self, dialogues: dict[str, Dialogue]) -> list[Any]:
        """Begin anew."""
        dialogues.clear()
        return self.show(dialogues)

    def forget(self, number: int, dialogues: dict[str, Dialogue]) -> None:
        """Begin anew in one column."""
        dialogues.pop(self.context.names[number], None)

    def save(self, number: int, dialogues: dict[str, Dialogue], request: gr.Request) -> list[Any]:
        """Append a conversation to the file of those, as a row that training reads."""
        with told():
            dialogue = dialogues.get(self.context.names[number])
            if not dialogue or not dialogue.messages:
                raise UserError(say(request, "nothing_to_save"))
            append_row(self.context.folder / CONVERSATIONS_NAME, dialogue)
        note(say(request, "saved", file=CONVERSATIONS_NAME))
        return self.find_files()

    def prefer(
        self, number: int, dialogues: dict[str, Dialogue], liked: gr.LikeData, request: gr.Request
    ) -> list[Any]:
        """Append an answer, and those that it is better or worse than, to the file of preferred answers."""
        if not isinstance(liked.liked, bool):  # a second click, which takes the thumb away
            return self.find_files()
        name = self.context.names[number]
        pairs = find_pairs(dialogues, name, liked.index, liked.liked)
        if not pairs:
            warn(say(request, "nothing_to_prefer"))
            return self.find_files()
        _append(self.context.folder / PREFERENCES_NAME, pairs)
        note(say(request, "preferred", file=PREFERENCES_NAME, count=len(pairs)))
        return self.find_files()


def _make_column() -> Column:
    with gr.Column(min_width=_NARROWEST, visible=False) as frame:
        # Without the button that copies, as it would copy what `_as_plain` writes.
        chat = gr.Chatbot(render_markdown=False, height=_HEIGHT, buttons=[], elem_classes="answers")
        save = gr.Button(TEXT("save"), size="sm", elem_classes="save")
    return Column(frame, chat, save)


def _as_plain(dialogue: Dialogue) -> list[Message]:
    """Return messages as plain text: an answer may look like HTML, which the page would show as such."""
    return [{**message, "content": html.escape(message["content"], quote=False)} for message in dialogue.messages]


def _make_settings() -> list[Any]:
    with gr.Accordion(TEXT("settings"), open=False):
        system = gr.Textbox("", label=TEXT("system"), info=TEXT("system_hint"), elem_id="system")
        with gr.Row():
            most = gr.Number(_DEFAULTS["max_new_tokens"], precision=0, label=TEXT("max_new_tokens"), minimum=1)
            draws = gr.Checkbox(label=TEXT("do_sample"), info=TEXT("do_sample_hint"), min_width=200)
            temperature = gr.Slider(0.05, 2, _DEFAULTS["temperature"], step=0.05, label=TEXT("temperature"))
            top_p = gr.Slider(0.05, 1, _DEFAULTS["top_p"], step=0.05, label=TEXT("top_p"))
            top_k = gr.Number(_DEFAULTS["top_k"], precision=0, label=TEXT("top_k"), minimum=0)
            seed = gr.Number(_DEFAULTS["seed"], precision=0, label=TEXT("seed"))
    return [system, most, draws, temperature, top_p, top_k, seed]


def _append(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
