"""Measure what a prefix keeps of a document: a model asked with the document in context, the prefix, and neither."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel

from glm_peft.adapters.divergence_loss import compare_all
from glm_peft.adapters.label_loss import (
    Project,
    at_labels,
    attach_label_loss,
    has_label_loss,
    mean_over_labels,
    replaced_loss,
)
from glm_peft.distillation.lessons import Lessons
from glm_peft.distillation.reading import Reader, Readers, encode_text, reads_both_ways
from glm_peft.metrics import SCORE_NAMES, compute_scores
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.prediction.generation_settings import GenerationSettings, num_virtual_tokens, token_bytes
from glm_peft.prediction.prefix_cache import prefix_computed_once
from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.preprocessing.messages import Message

DOCUMENT, PREFIX, NEITHER = "document", "prefix", "neither"
TIMED_QUESTIONS, TIMED_SECONDS = 8, 60  # the most of each by which the time to the first token is measured


@dataclass(frozen=True)
class Way:
    """
    One way to ask a model about a document.

    Args:
        name: `DOCUMENT`, `PREFIX` or `NEITHER`.
        answering: the model that answers this way.
        encode: turns a conversation into the ids of its prompt.
        context_tokens: how many tokens stand before the question.
        whole_prompt: turns a conversation into the ids that the base is given where nobody has cached the document;
            `None` where they are those of `encode`.
    """

    name: str
    answering: Answering
    encode: Callable[[list[Message]], list[int]]
    context_tokens: int
    whole_prompt: Callable[[list[Message]], list[int]] | None = None


def ways_of(reader: Reader, adapted: PeftModel) -> list[Way]:
    """Return the three ways to ask about what a reader reads, one of them with the prefix of `adapted`."""
    bare = replace(reader, answering=replace(reader.answering, model=adapted.get_base_model()), text="")
    with_prefix = replace(reader.answering, model=adapted)

    def encode_whole(messages: list[Message]) -> list[int]:
        return encode_text(reader.base, reader.text) + bare.encode(messages)

    whole = None if reads_both_ways(reader.base) else encode_whole
    return [
        Way(DOCUMENT, reader.answering, reader.encode, reader.num_tokens, whole),
        Way(PREFIX, with_prefix, bare.encode, num_virtual_tokens(adapted)),
        Way(NEITHER, bare.answering, bare.encode, 0),
    ]


@dataclass(frozen=True)
class Measures:
    """
    The measures of one way.

    Args:
        divergence: of its predictions from those with the document, over the tokens of the answers that the document
            gives (Kullback-Leibler, all tokens of the vocabulary, in nats per token).
        same_answers: share of greedy answers that are those with the document, 0 to 1.
        scores: of the answers against those with the document, by the names of `SCORE_NAMES`.
        exact_match: share of the user's own answers that were met exactly, 0 to 1; `None` where there are none.
        context_tokens: tokens before the question.
        cache_bytes: of their keys and values, in one row.
        first_token_seconds: from a prompt to the first token of its answer.
    """

    divergence: float
    same_answers: float
    scores: dict[str, float]
    exact_match: float | None
    context_tokens: int
    cache_bytes: int
    first_token_seconds: float


@dataclass(frozen=True)
class Comparison:
    """
    Measures by the name of the way, and of what: questions, the user's own answers, tokens of answers.

    Args:
        answers: a row a question: its `messages`, the user's own answer as `reference`, and those of the ways.
    """

    ways: dict[str, Measures]
    questions: int
    references: int
    answer_tokens: int
    protocol: str
    answers: list[dict[str, Any]] = field(default_factory=list)


def compare_held_out(lessons: Lessons, readers: Readers, student: PeftModel, scoring: Scoring) -> Comparison:
    """Compare on the questions that were held out, each with the text in context that it is about; see `compare`."""
    # As training may have left it on, and PEFT then puts no further prefix, such as a text, on the base.
    readers.model.activation_checkpointing_disable()
    by_text: dict[int, list[dict[str, Any]]] = {}
    for row in lessons.held_out:
        by_text.setdefault(row["context"], []).append(row)
    compared = []
    for context, rows in by_text.items():
        questions, references = [row["messages"][:-1] for row in rows], [row.get("reference") for row in rows]
        ways = ways_of(readers(lessons.texts[context]), student)
        compared.append(compare(ways, questions, references, scoring.settings, scoring.protocol))
    return join(compared)


def compare(
    ways: Sequence[Way],
    questions: Sequence[list[Message]],
    references: Sequence[str | None],
    settings: GenerationSettings,
    protocol: str,
) -> Comparison:
    """
    Ask each way the same questions, and measure how far it is from the one that has the document in context.

    The models are in evaluation mode afterwards. Every process must call this, and gets the same but for the seconds.

    Args:
        ways: one of each name.
        questions: conversations that end with a question.
        references: the user's own answers; `None` where there is none.
        settings: by which answers are generated, always greedily.
        protocol: the name of the score protocol.

    Raises:
        UserError: there are no questions.
    """
    (document,) = (way for way in ways if way.name == DOCUMENT)
    greedy = replace(settings, do_sample=False, num_beams=1)
    answers = {way.name: _answer(way, questions, greedy) for way in ways}
    encoded = [_encode_answer(document, answer) for answer in answers[DOCUMENT]]
    divergences = measure_divergences(ways, questions, encoded)
    measured = {}
    for way in ways:
        own = answers[way.name]
        scores = compute_scores(own, answers[DOCUMENT], protocol)
        measured[way.name] = Measures(
            divergence=divergences[way.name],
            same_answers=_share_of_equal(zip(own, answers[DOCUMENT], strict=True)),
            scores={name: scores[name] for name in SCORE_NAMES},
            exact_match=_share_of_equal(zip(own, references, strict=True)),
            context_tokens=way.context_tokens,
            cache_bytes=way.context_tokens * token_bytes(way.answering.model),
            first_token_seconds=_time_first_token(way, questions[:TIMED_QUESTIONS]),
        )
    known = sum(reference is not None for reference in references)
    rows = [
        {"messages": question, "reference": reference} | {name: said[number] for name, said in answers.items()}
        for number, (question, reference) in enumerate(zip(questions, references, strict=True))
    ]
    return Comparison(measured, len(questions), known, sum(map(len, encoded)), protocol, rows)


_MEANS = [field.name for field in fields(Measures) if field.name != "scores"]
# By what a mean over several comparisons is weighted where it is not by questions.
_WEIGHTS = {"divergence": "answer_tokens", "exact_match": "references"}


def join(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the comparison over all questions of several, such as those about the pieces of a long document."""

    def mean(values: Iterable[float | None], name: str) -> float | None:
        weights = [getattr(one, _WEIGHTS.get(name, "questions")) for one in comparisons]
        weighted = [value * weight for value, weight in zip(values, weights, strict=True) if weight]
        return sum(weighted) / sum(weights) if weighted else None

    ways = {}
    for way in comparisons[0].ways:
        of_way = [one.ways[way] for one in comparisons]
        found = {name: mean([getattr(one, name) for one in of_way], name) for name in _MEANS}
        scores = {name: mean([one.scores[name] for one in of_way], name) for name in SCORE_NAMES}
        sizes = {name: round(found[name]) for name in ("context_tokens", "cache_bytes")}
        ways[way] = Measures(**found | sizes, scores=scores)
    sums = {
        name: sum(getattr(one, name) for one in comparisons) for name in ("questions", "references", "answer_tokens")
    }
    answers = [row for one in comparisons for row in one.answers]
    return Comparison(ways, protocol=comparisons[0].protocol, answers=answers, **sums)


@torch.no_grad()
def measure_divergences(
    ways: Sequence[Way], questions: Sequence[list[Message]], answers: Sequence[list[int]]
) -> dict[str, float]:
    """
    Measure for each way the divergence from the one with the document, in nats per token of the answers.

    Args:
        answers: ids with their end token.
    """
    # All processes do all rows: they are few, and a model whose shards they hold must be called by all equally often.
    (document,) = (way for way in ways if way.name == DOCUMENT)
    for way in ways:
        way.answering.model.eval()
    totals = dict.fromkeys((way.name for way in ways), 0.0)
    for question, answer in zip(questions, answers, strict=True):
        teacher = _Teacher()
        _run(document, question, answer, teacher.keep)
        for way in ways:
            totals[way.name] += _run(way, question, answer, teacher.compare).item()
    return {name: total / sum(map(len, answers)) for name, total in totals.items()}


class _Teacher:
    """The hidden states with the document in context, and losses for `replaced_loss` that keep and compare them."""

    def keep(self, hidden_states: torch.Tensor, labels: torch.Tensor, *args: object) -> torch.Tensor:
        self.states, _ = at_labels(hidden_states, labels)
        return self.states.new_zeros(())

    def compare(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, project: Project, *args: object
    ) -> torch.Tensor:
        """Return the divergence [], summed over the answer's tokens."""

        def measure(logits: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            return compare_all(logits, project(self.states[chunk]))

        states, _ = at_labels(hidden_states, labels)
        return mean_over_labels(states, project, measure, num_items_in_batch=1)


def _run(way: Way, question: list[Message], answer: list[int], compute: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Run a way on a question with its answer, and return the loss [] that `compute` makes of it."""
    model, prompt = way.answering.model, way.encode(question)
    if not has_label_loss(base_of(model)):
        attach_label_loss(base_of(model))
    inputs = _as_inputs(model, prompt + answer)
    labels = inputs["input_ids"].clone()
    labels[:, : len(prompt)] = IGNORED_LABEL
    with replaced_loss(base_of(model), compute):
        return model(**inputs, labels=labels, use_cache=False).loss


def _as_inputs(model: PreTrainedModel | PeftModel, ids: list[int]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([ids], device=model.device)
    positions = torch.arange(len(ids), device=model.device)[None]  # to which PEFT adds the length of its prefix
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "position_ids": positions}


def _answer(way: Way, questions: Sequence[list[Message]], settings: GenerationSettings) -> list[str]:
    return way.answering.generate({"input_ids": [way.encode(question) for question in questions]}, settings)


def _encode_answer(way: Way, answer: str) -> list[int]:
    """Return the ids of an answer with its end token, as training has them."""
    return way.answering.chat_format.encode_answer(way.answering.tokenizer, answer).ids


def _share_of_equal(pairs: Iterable[tuple[str, str | None]]) -> float | None:
    known = [answer.strip() == reference.strip() for answer, reference in pairs if reference is not None]
    return sum(known) / len(known) if known else None


@torch.no_grad()
def _time_first_token(way: Way, questions: Sequence[list[Message]]) -> float:
    """Return the median of the seconds that the forward pass from a prompt to its first token takes."""
    model, encode = way.answering.model, way.encode
    if way.whole_prompt:
        model, encode = base_of(model), way.whole_prompt

    def measure(question: list[Message]) -> float:
        inputs = _as_inputs(model, encode(question))
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1).logits.argmax().item()  # waits for the device
        return time.perf_counter() - start

    with prefix_computed_once(model):
        first = measure(questions[0])  # slower than those that follow, and not counted
        # A long document takes minutes a question on a CPU. Processes that share a model must agree on their number.
        (number,) = broadcast_object_list([max(int(TIMED_SECONDS / first), 1)])
        return median(map(measure, questions[:number]))
