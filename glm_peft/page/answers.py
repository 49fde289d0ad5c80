"""One question to several at once: their answers grow side by side, in one batch of the engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answer_text import stream_text
from glm_peft.serving.dialogue import Dialogue
from glm_peft.serving.engine import AnswerRequest, Engine, EngineStopped

_INTERVAL = 0.1  # seconds between two looks at what has come: an eye sees no more


@dataclass
class Round:
    """
    One question to several, each in a conversation of its own, which grows while they answer.

    Args:
        dialogues: by the name of who answers.
        faults: what went wrong, by name; the question is taken back there.
        forgotten: who could not be shown the oldest messages any longer.
        silent: who gave an empty answer; the question is taken back there.
    """

    engine: Engine
    dialogues: Mapping[str, Dialogue]
    settings: GenerationSettings
    faults: dict[str, str] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    async def ask(self, question: str) -> AsyncIterator[None]:
        """Ask, and yield whenever there may be more of the answers; closing it ends them as they are."""
        tasks = [asyncio.create_task(self._answer(name, question)) for name in self.dialogues]
        try:
            waiting = set(tasks)
            while waiting:
                _, waiting = await asyncio.wait(waiting, timeout=_INTERVAL)
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            task.result()  # an error of ours is raised

    async def _answer(self, name: str, question: str) -> None:
        dialogue = self.dialogues[name]
        dialogue.add("user", question)
        try:
            await self._stream(name, dialogue)
        except (UserError, EngineStopped) as error:
            self.faults[name] = str(error)
        finally:
            if dialogue.messages[-1]["role"] == "user":
                dialogue.undo()
                if name not in self.faults:
                    self.silent.append(name)

    async def _stream(self, name: str, dialogue: Dialogue) -> None:
        before, longest = dialogue.forgotten, self.engine.longest_prompt(name, self.settings.max_new_tokens)
        prompt = dialogue.encode(partial(self.engine.answerers.encode, name), longest)
        if dialogue.forgotten > before:
            self.forgotten.append(name)
        async with aclosing(stream_text(self.engine, AnswerRequest(name, prompt, self.settings))) as pieces:
            async for piece in pieces:
                if dialogue.messages[-1]["role"] == "user" and piece.text:
                    dialogue.add("assistant", "")
                if piece.text:
                    dialogue.messages[-1]["content"] += piece.text


def find_pairs(dialogues: Mapping[str, Dialogue], name: str, number: int, is_better: bool) -> list[dict[str, Any]]:
    """
    Pair an answer with what the others answered in its place.

    Args:
        name: who gave it.
        number: of its message in the conversation.
        is_better: whether it is better than the others, or worse.

    Returns:
        rows of preference data, in the conversational form of TRL: `prompt`, `chosen`, `rejected`, and `names`.
    """
    rows = []
    for other, dialogue in dialogues.items():
        if other == name or len(dialogue.messages) <= number:
            continue
        better, worse = (name, other) if is_better else (other, name)
        chosen, rejected = (dialogues[one].messages[number] for one in (better, worse))
        if chosen["content"] != rejected["content"]:
            names = {"chosen": better, "rejected": worse}
            rows.append(
                {"prompt": _before(dialogues[better], number), "chosen": [chosen], "rejected": [rejected]}
                | {"names": names}
            )
    return rows


def _before(dialogue: Dialogue, number: int) -> list[Message]:
    return Dialogue(dialogue.system, dialogue.messages[:number]).whole()
