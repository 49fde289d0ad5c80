"""Tell what was won and lost with a prefix in the place of a document: table, picture, file and warning."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from glm_peft.distillation.comparison import DOCUMENT, NEITHER, PREFIX, Comparison, Measures
from glm_peft.distillation.picture import plot_comparison
from glm_peft.metrics import PROTOCOLS, SCORE_NAMES
from glm_peft.provenance.ownership import WEIGHTS_KEY, digest_weights
from glm_peft.reporting.file_names import COMPARISON_ANSWERS_NAME, COMPARISON_NAME, COMPARISON_PICTURE_NAME
from glm_peft.reporting.files import read_json, write_atomically
from glm_peft.reporting.results import format_bytes

logger = logging.getLogger(__name__)

_WORDS = {
    "en": {
        "asked": "{questions:,} held-out questions, each asked with the document in context, with the prefix "
        "and with neither; answers by the likeliest token each time, divergence over the {answer_tokens:,} tokens of "
        "those with the document, scores by protocol `{protocol}`:",
        "head": ("", "document in context", "prefix", "neither"),
        "divergence": "divergence from the document in context, nats per token",
        "same": "answers equal to those with the document, %",
        "exact": "answers equal to the references ({}), %",
        "score": "{} against the answers with the document",
        "tokens": "tokens before the question",
        "memory": "memory of their keys and values, a row",
        "seconds": "seconds to the first token",
        "sentence": "Won: with every question {saved:,} tokens of context fewer, the memory of their keys and values "
        "down by a factor of {memory:.1f}, the time to the first token by {time:.1f}. Lost: {other:.0f} % of the "
        "answers are not those with the document (with neither {other_neither:.0f} %), and the divergence is "
        "{prefix:.3g} (with neither {neither:.3g}).",
    },
    "zh": {
        "asked": "{questions:,} 个没有训练过的问题，分别在上下文中有文档、用前缀、两者都没有时提问；"
        "回答每次取最可能的 token，散度按有文档时的回答的 {answer_tokens:,} 个 token 计算，分数按协议 `{protocol}`：",
        "head": ("", "上下文中有文档", "前缀", "都没有"),
        "divergence": "与上下文中有文档时的散度，nat 每 token",
        "same": "与有文档时相同的回答，%",
        "exact": "与参考答案相同的回答（{} 个），%",
        "score": "{}，对有文档时的回答",
        "tokens": "问题之前的 token 数",
        "memory": "其键和值的内存，每行",
        "seconds": "到第一个 token 的秒数",
        "sentence": "得：每个问题少 {saved:,} 个 token 的上下文，键和值的内存为 1/{memory:.1f}，"
        "到第一个 token 的时间为 1/{time:.1f}。失：{other:.0f} % 的回答与有文档时不同"
        "（都没有时为 {other_neither:.0f} %），散度为 {prefix:.3g}（都没有时为 {neither:.3g}）。",
    },
}


def write_comparison(folder: str | Path, comparison: Comparison) -> None:
    """
    Write `comparison.json`, its picture and its answers beside an adapter, and log it, in the main process.

    A prefix that is no better than neither is warned of.

    Args:
        folder: with the weights of the adapter, whose digest the file states.
    """
    if not PartialState().is_main_process:
        return
    folder = Path(folder)
    content = asdict(comparison) | {WEIGHTS_KEY: digest_weights(folder)}
    # Apart from the measures, which are pushed: answers tell what is in the documents.
    answers = [json.dumps(row, ensure_ascii=False) + "\n" for row in content.pop("answers")]
    write_atomically(folder / COMPARISON_ANSWERS_NAME, "".join(answers))
    write_atomically(folder / COMPARISON_NAME, json.dumps(content, indent=2) + "\n")
    try:
        (folder / COMPARISON_PICTURE_NAME).unlink(missing_ok=True)  # an earlier one would be taken for this one's
        plot_comparison(comparison, folder / COMPARISON_PICTURE_NAME)
    except (OSError, ImportError) as error:
        logger.warning("The comparison could not be drawn (%s).", error)
    logger.info("%s", format_comparison(comparison))
    if is_useless(comparison):
        logger.warning(
            "The prefix is no better than neither prefix nor document on %d held-out questions: try more "
            "conversations or steps, a start from the document, or a larger --num_virtual_tokens.",
            comparison.questions,
        )


def read_comparison(folder: str | Path) -> Comparison | None:
    """Return the comparison in a folder; `None` where there is none, or something else in its place."""
    found = read_json(Path(folder) / COMPARISON_NAME)
    found.pop(WEIGHTS_KEY, None)
    try:
        comparison = Comparison(**found | {"ways": {name: Measures(**one) for name, one in found["ways"].items()}})
        format_comparison(comparison)  # anyone may have edited it: what can be shown is taken for what was written
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    return comparison if comparison.protocol in PROTOCOLS else None


def is_useless(comparison: Comparison) -> bool:
    """Whether the prefix is not nearer to the document than the base alone."""
    # By the divergence alone: of answers that are all wrong some score is always a little higher.
    return comparison.ways[PREFIX].divergence >= comparison.ways[NEITHER].divergence


def format_comparison(comparison: Comparison, language: str = "en") -> str:
    """
    Return the comparison as a table in Markdown, between what was asked and a sentence on what was won and lost.

    Args:
        language: `en` or `zh`.
    """
    words = _WORDS[language]
    rows = [words["head"], ("---", *["---:"] * 3)]
    rows += [
        (title, *(show(comparison.ways[way]) for way in (DOCUMENT, PREFIX, NEITHER)))
        for title, show in _rows(comparison, words)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    asked = words["asked"].format(**vars(comparison))
    return "\n".join([asked, "", *lines, "", words["sentence"].format(**_gains(comparison))])


def _rows(comparison: Comparison, words: dict) -> list[tuple[str, Callable[[Measures], str]]]:
    """Return the title of each row of the table, and what shows its value."""
    rows = [
        (words["tokens"], lambda way: f"{way.context_tokens:,}"),
        (words["memory"], lambda way: format_bytes(way.cache_bytes)),
        (words["seconds"], lambda way: f"{way.first_token_seconds:.3g}"),
        (words["divergence"], lambda way: f"{way.divergence:.4g}"),
        (words["same"], lambda way: f"{100 * way.same_answers:.1f}"),
    ]
    if comparison.references:
        rows.append((words["exact"].format(comparison.references), lambda way: f"{100 * way.exact_match:.1f}"))
    for name in SCORE_NAMES:
        rows.append((words["score"].format(name.upper()), lambda way, name=name: f"{way.scores[name]:.4g}"))
    return rows


def _gains(comparison: Comparison) -> dict[str, float]:
    """Return the numbers of the sentence."""
    document, prefix, neither = (comparison.ways[way] for way in (DOCUMENT, PREFIX, NEITHER))
    return {
        "saved": document.context_tokens - prefix.context_tokens,
        "memory": document.cache_bytes / prefix.cache_bytes,
        "time": document.first_token_seconds / prefix.first_token_seconds,
        "prefix": prefix.divergence,
        "neither": neither.divergence,
        "other": 100 * (1 - prefix.same_answers),
        "other_neither": 100 * (1 - neither.same_answers),
    }
