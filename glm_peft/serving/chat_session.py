"""What a chat in a terminal does with each line: a question is answered, a command obeyed."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from glm_peft.errors import UserError
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction.generation_settings import GenerationSettings, num_virtual_tokens
from glm_peft.serving.answerers import BASE, Answerers
from glm_peft.serving.dialogue import Dialogue, append_row
from glm_peft.serving.streaming import TextStream


class ChatSession:
    """
    A chat: who answers, how, and the conversation so far.

    Args:
        answerers: the base and its adapters.
        settings: how answers are generated.
        dialogue: empty at first.
        name: who answers first.
        is_typed: whether somebody sits at the terminal, whose Ctrl-C ends an answer instead of the chat.
    """

    def __init__(
        self,
        answerers: Answerers,
        settings: GenerationSettings,
        dialogue: Dialogue,
        name: str = BASE,
        is_typed: bool = True,
    ) -> None:
        self.answerers, self.settings, self.dialogue, self.name = answerers, settings, dialogue, name
        self.is_typed = is_typed

    def take(self, line: str) -> None:
        """Answer a question, or obey a command, which begins with a slash; what is wrong is told, no error raised."""
        try:
            if line.startswith("/"):
                word, _, rest = line[1:].partition(" ")
                self._find_command(word)(rest.strip())
            else:
                self._ask(line)
        except UserError as error:
            self.remark(str(error))

    def remark(self, text: str) -> None:
        """Print what is no answer, where it is in nobody's way who reads answers from a pipe."""
        print(text, file=sys.stderr, flush=True)

    def do_help(self, _: str) -> None:
        """/help: list the commands."""
        self.remark("\n".join(str(command.__doc__) for command in self._commands().values()))

    def do_clear(self, _: str) -> None:
        """/clear: forget the conversation, but not the system text."""
        self.dialogue.clear()

    def do_undo(self, _: str) -> None:
        """/undo: take back the last question and its answer."""
        question = self.dialogue.undo()
        self.remark("There is nothing to take back." if question is None else f"Taken back: {question}")

    def do_retry(self, _: str) -> None:
        """/retry: answer the last question again, with --do_sample by other draws."""
        question = self._undo_last()
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        self._ask(question)

    def do_system(self, text: str) -> None:
        """/system TEXT: set the system text, which comes before all turns; without TEXT there is none."""
        self.dialogue.system = text or None

    def do_adapter(self, name: str) -> None:
        """/adapter NAME: let the adapter of this name answer from now on, or the base."""
        if name not in self.answerers.by_name:
            raise UserError(f"There is no adapter {name!r}; choose one of {', '.join(self.answerers.by_name)}.")
        self.name = name

    def do_compare(self, _: str) -> None:
        """/compare: let the base and the adapter (while the base answers: all) answer the last question once more."""
        kept = list(self.dialogue.messages)
        self.dialogue.add("user", self._undo_last())
        try:
            for name in [BASE, self.name] if self.name != BASE else self.answerers.by_name:
                self.remark(f"{name}:")
                self._answer(name)
        finally:
            self.dialogue.messages = kept

    def do_save(self, file: str) -> None:
        """/save FILE: append the conversation to FILE as a row that training reads."""
        if not file or not self.dialogue.messages:
            raise UserError("Give /save a FILE such as chat.jsonl, after the first answer.")
        append_row(Path(file).expanduser(), self.dialogue)
        self.remark(f"Saved as a row of {file}.")

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {name[3:]: getattr(self, name) for name in vars(type(self)) if name.startswith("do_")}

    def _find_command(self, word: str) -> Callable[[str], None]:
        commands = self._commands()
        if word not in commands:
            raise UserError(
                f"There is no command /{word}, only /{', /'.join(commands)}; a question that begins with a slash "
                "needs a blank before it."
            )
        return commands[word]

    def _undo_last(self) -> str:
        question = self.dialogue.undo()
        if question is None:
            raise UserError("There is no question yet.")
        return question

    def _ask(self, question: str) -> None:
        self.dialogue.add("user", question)
        try:
            answer = self._answer(self.name)
        except UserError:
            self.dialogue.undo()
            raise
        if answer:
            self.dialogue.add("assistant", answer)
        else:
            self.dialogue.undo()
            self.remark("The answer is empty, and the question is taken back.")

    def _answer(self, name: str) -> str:
        """Stream an answer to the conversation; Ctrl-C ends it, and what was shown of it counts."""
        answering = self.answerers.by_name[name]
        before = self.dialogue.forgotten
        prompt = self.dialogue.encode(partial(self.answerers.encode, name), self._longest_prompt(name))
        if self.dialogue.forgotten > before:
            self.remark(f"The oldest {self.dialogue.forgotten} messages no longer fit into the prompt.")
        stream = TextStream(answering, lambda text: print(text, end="", flush=True))
        try:
            stream.finish(self.answerers.answer(name, prompt, self.settings, stream))
        except KeyboardInterrupt:
            if not self.is_typed:
                raise
            self.remark(" …")
        print(flush=True)
        return stream.text

    def _longest_prompt(self, name: str) -> int:
        """Return the tokens that the model's positions leave for a prompt, beside the prefix and the answer."""
        model = self.answerers.by_name[name].model
        positions = base_of(model).config.max_position_embeddings
        return positions - num_virtual_tokens(model) - self.settings.max_new_tokens
