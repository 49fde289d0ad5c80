"""
Let a base ask about a text that it reads.

After the self-study of "Cartridges" (arXiv 2506.06266): by requests of several kinds, about one piece of the text at
a time, so that all of it is asked about.
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glm_peft.arguments.distil import DistilArguments
from glm_peft.distillation.conversation_file import Question
from glm_peft.distillation.reading import Reader, Readers, Reading
from glm_peft.distillation.seed_prompts import SEED_PROMPTS, language_of
from glm_peft.models.shortening import Message
from glm_peft.prediction.generation import seed_of_draws
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.run_description import describe_settings

logger = logging.getLogger(__name__)

_LABEL = re.compile(
    r"^[*#\s]*(?:\d+(?:、|[.)]\s))?\s*(?:(?:问题|请求|提问|Question|Request)[*\s]*[:：][*\s]*)?", re.IGNORECASE | re.M
)
_ANSWER = re.compile(r"^[*#\s]*(?:答案|回答|答|Answer)[*\s]*[:：]", re.IGNORECASE | re.M)
_QUOTES = ('""', "“”", "「」", "''")


@dataclass(frozen=True)
class Group:
    """Requests, each with its kind, for questions about one piece of one of the texts."""

    context: int
    piece: int
    requests: list[tuple[str, str]]


class SelfStudy:
    """
    Questions that a base asks about the pieces of texts.

    Args:
        reading: the texts and their pieces.
        readers: put a text in front of the base.
        settings: by which an answer is generated; questions differ in what makes them varied.
        group_size: the most questions of a group.
    """

    def __init__(
        self,
        reading: Reading,
        readers: Readers,
        distil_args: DistilArguments,
        settings: GenerationSettings,
        group_size: int,
    ) -> None:
        self.reading, self.readers, self.num_questions = reading, readers, distil_args.num_conversations
        # Drawn, or a piece would be asked the same again and again.
        drawing = {"do_sample": True, "temperature": distil_args.question_temperature, "top_p": 1.0, "num_beams": 1}
        self.settings = replace(settings, **drawing)
        language = distil_args.question_language or language_of(reading.text)
        num_pieces = [len(pieces) for pieces in reading.chunks]
        self.groups = plan_study(num_pieces, self.num_questions, language, settings.seed, group_size)
        self.run = {
            "num_conversations": self.num_questions,
            "language of the questions": language,
            "seed": settings.seed,
            "settings of the questions": describe_settings(self.settings),
        }

    def ask(self, number: int) -> list[Question]:
        """Generate the questions of a group."""
        group = self.groups[number]
        kinds, requests = zip(*group.requests, strict=True)
        reader = self.readers(self.reading.chunks[group.context][group.piece])
        texts = generate(reader, [[_from_user(request)] for request in requests], self.settings, number)
        questions = [[_from_user(clean_question(text))] for text in texts]
        return [Question(question, kind, group.context) for question, kind in zip(questions, kinds, strict=True)]


def plan_study(
    num_pieces: Sequence[int], num_questions: int, language: str, seed: int, group_size: int
) -> list[Group]:
    """
    Plan what is asked about which piece: pieces take turns in a drawn order, and so do the kinds of questions.

    Args:
        num_pieces: of each text.
        language: of the requests, a key of `SEED_PROMPTS`.
        group_size: the most requests of a group; groups are smaller where not all pieces would have one.
    """
    total, draw = sum(num_pieces), random.Random(seed)
    if num_questions < total:
        logger.warning(
            "--num_conversations %d is too few for the %d pieces of the documents, of which some are not asked about.",
            *(num_questions, total),
        )
    size = max(1, min(group_size, num_questions // total))
    turns, requests = _take_turns(draw, num_pieces), _draw_requests(draw, language)
    sizes = [min(size, num_questions - start) for start in range(0, num_questions, size)]
    return [Group(*next(turns), [next(requests) for _ in range(size)]) for size in sizes]


def generate(reader: Reader, prompts: list[list[Message]], settings: GenerationSettings, group: int) -> list[str]:
    """Generate what the reader answers to the prompts of a group; what is drawn depends on the group alone."""
    features = {"input_ids": [reader.encode(messages) for messages in prompts]}
    settings = replace(settings, seed=seed_of_draws(settings.seed, group))
    return reader.answering.generate(features, settings, shows_progress=False)


def clean_question(text: str) -> str:
    """Return the question or request of a generated text, without its label, its quotation marks and what follows."""
    text = _LABEL.sub("", _ANSWER.split(text.strip())[0]).strip()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    # A situation may have lines of its own before its question; a request has no question mark.
    ends = [number for number, line in enumerate(lines, 1) if line.rstrip("*\"'”」").endswith(("?", "？"))]
    text = "\n".join(lines[: ends[0] if ends else 1]).strip("*").strip()
    return text[1:-1].strip() if text[:1] + text[-1:] in _QUOTES else text


def _take_turns(draw: random.Random, num_pieces: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of text and piece, round after round; a text's pieces together, as it stays open meanwhile."""
    while True:
        for context in draw.sample(range(len(num_pieces)), len(num_pieces)):
            pieces = num_pieces[context]
            yield from ((context, piece) for piece in draw.sample(range(pieces), pieces))


def _draw_requests(draw: random.Random, language: str) -> Iterator[tuple[str, str]]:
    requests = SEED_PROMPTS[language]
    while True:
        for kind in draw.sample(list(requests), len(requests)):
            yield kind, draw.choice(requests[kind])


def _from_user(text: str) -> Message:
    return {"role": "user", "content": text}
