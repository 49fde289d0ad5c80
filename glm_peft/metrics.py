"""
Score generated Chinese text by the published protocols: two functions, and an `evaluate` metric around them.

Both protocols take ROUGE-1/2/L as the F value of `rouge_chinese` over jieba words (times 100, rounded to 4 digits a
row) and BLEU-4 as NLTK's `sentence_bleu` with smoothing method 3. They differ in what BLEU counts:

- `thudm` (ChatGLM-6B, ChatGLM2-6B): characters; times 100, rounded to 4 digits a row.
- `chatglm3` (ChatGLM3-6B, GLM-4): jieba words; 0 to 1, not rounded. The published scripts leave special tokens in the
  text that they score.

The score of a file is the plain mean over its rows. Scored are the texts that are given; the published scripts of
`thudm` give others than the file's, and so does `glm_peft.prediction.evaluation.score_answers`.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

import datasets
import evaluate
import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge
from rouge_chinese.rouge_score import f_r_p_rouge_n, rouge_n
from tqdm.auto import tqdm

from glm_peft.errors import UserError

jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr

PROTOCOLS = ("thudm", "chatglm3")
SCORE_NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
COUNT_NAMES = ("empty_predictions", "empty_references")
TEXT_SCORE_NAMES = {name: f"text-{name}" for name in (*SCORE_NAMES, "exact_match")}
"""Names of the scores against the text of the file, where those of the protocol compare with another."""
PAIRS_WITHOUT_PROGRESS_BAR = 300  # scored sooner than anyone would look for a bar
_KEPT_PAIRS = 1 << 14

_cut_sentences = Rouge().cut_sent
# With it a perfect answer of 1, 2 or 3 units gets a BLEU-4 of 0.35, 0.59 or 0.84. Kept, as published scores have it;
# the exact match stands beside it.
_smoothing = SmoothingFunction().method3


def compute_scores(predictions: Sequence[str], references: Sequence[str], protocol: str = "thudm") -> dict[str, float]:
    """
    Score a set of predictions.

    Args:
        predictions: the generated answers, without special tokens.
        references: the right answers, in the same order.
        protocol: one of `PROTOCOLS`; see the module's docstring.

    Returns:
        The keys of `score_pair`: means over all pairs, except for `empty_predictions` and `empty_references`, which
        count rows.

    Raises:
        UserError: for an unknown protocol, for no pairs at all, and for lists of different lengths.
    """
    _check_protocol(protocol)
    if len(predictions) != len(references) or not predictions:
        raise UserError(
            f"Scores need one reference per prediction and at least one pair, but there are {len(predictions)} "
            f"predictions and {len(references)} references: pass two lists of the same length."
        )
    pairs = zip(predictions, references, strict=True)
    few = len(predictions) <= PAIRS_WITHOUT_PROGRESS_BAR
    progress = tqdm(pairs, total=len(predictions), desc="Scoring", unit="pair", disable=few)
    rows = [score_pair(prediction, reference, protocol) for prediction, reference in progress]
    return {name: (sum if name in COUNT_NAMES else fmean)([row[name] for row in rows]) for name in rows[0]}


def score_pair(prediction: str, reference: str, protocol: str = "thudm") -> dict[str, float]:
    """
    Score one prediction; an empty prediction or reference (nothing but white space) scores 0.

    Args:
        prediction: the generated answer.
        reference: the right answer.
        protocol: one of `PROTOCOLS`; see the module's docstring.

    Returns:
        `rouge-1`, `rouge-2`, `rouge-l` (0 to 100), `bleu-4` (0 to 100, in `chatglm3` 0 to 1), `exact_match` (0 or 100;
        white space around the texts does not count), `prediction_length` and `reference_length` (characters),
        `empty_predictions` and `empty_references` (0 or 1).

    Raises:
        UserError: for an unknown protocol.
    """
    _check_protocol(protocol)
    empty_prediction, empty_reference = not prediction.strip(), not reference.strip()
    # rouge_chinese raises for an empty text, at which the published scripts crash.
    if empty_prediction or empty_reference:
        scores = dict.fromkeys((*SCORE_NAMES, "exact_match"), 0.0)
    else:
        scores = _score_texts(prediction, reference, protocol)
    return scores | {
        "prediction_length": len(prediction),
        "reference_length": len(reference),
        "empty_predictions": int(empty_prediction),
        "empty_references": int(empty_reference),
    }


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """
    Compute the length of the longest common subsequence of two sequences of words.

    One bit per word of `first`, one step per word of `second` (H. Hyyrö, "Bit-parallel LCS-length computation
    revisited", 2004).
    """
    # rouge_chinese fills a table in Python: 101 s for 5,000 words against 5,000, which take milliseconds here.
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    all_bits = (1 << len(first)) - 1  # Python's integers have no width at which the sum below would be cut
    unmatched = all_bits
    for word in second:
        matches = unmatched & positions.get(word, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & all_bits
    return len(first) - unmatched.bit_count()


class ChineseGenerationMetric(evaluate.Metric):
    """
    Wrap `compute_scores` as a metric: `ChineseGenerationMetric("thudm").compute(predictions=…, references=…)`.

    Args:
        config_name: the protocol, one of `PROTOCOLS`; `None` is `thudm`.
        **kwargs: `evaluate.Metric`'s own (`keep_in_memory`, `num_process`, `process_id`, `experiment_id`, …).

    Raises:
        UserError: for an unknown protocol.
    """

    def __init__(self, config_name: str | None = None, **kwargs) -> None:
        protocol = config_name or PROTOCOLS[0]
        _check_protocol(protocol)
        super().__init__(config_name=protocol, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-1/2/L, BLEU-4 and exact match of generated Chinese text.",
            citation="",
            inputs_description="predictions and references: two lists of texts in the same order.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return compute_scores(predictions, references, self.config_name)


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"{protocol!r} is not a score protocol: choose one of {', '.join(PROTOCOLS)}.")


@lru_cache(maxsize=_KEPT_PAIRS)  # the model card needs the scores of each row again
def _score_texts(prediction: str, reference: str, protocol: str) -> dict[str, float]:
    prediction_words, reference_words = jieba.lcut(prediction), jieba.lcut(reference)
    scores = _rouge(prediction_words, reference_words)
    if protocol == "thudm":
        scores["bleu-4"] = round(100 * _bleu(list(prediction), list(reference)), 4)
    else:
        scores["bleu-4"] = _bleu(prediction_words, reference_words)
    scores["exact_match"] = 100.0 if prediction.strip() == reference.strip() else 0.0
    return scores


def _bleu(prediction: list[str], reference: list[str]) -> float:
    return float(sentence_bleu([reference], prediction, smoothing_function=_smoothing))


def _rouge(prediction_words: list[str], reference_words: list[str]) -> dict[str, float]:
    """Compute what `Rouge().get_scores` gives, by its own functions except for the longest common subsequence."""
    prediction, reference = _sentences(prediction_words), _sentences(reference_words)
    f_values = {
        "rouge-1": rouge_n(prediction, reference, 1)["f"],
        "rouge-2": rouge_n(prediction, reference, 2)["f"],
        "rouge-l": _rouge_l(prediction, reference),
    }
    return {name: round(100 * value, 4) for name, value in f_values.items()}


def _rouge_l(prediction: list[str], reference: list[str]) -> float:
    """Compute the F value of ROUGE-L over all words."""
    # rouge_chinese calls it summary level, but joins the sentences again: they have no part in it.
    words = [word for sentence in prediction for word in sentence.split(" ")]
    reference_words = [word for sentence in reference for word in sentence.split(" ")]
    common = longest_common_subsequence(reference_words, words)
    return f_r_p_rouge_n(len(words), len(reference_words), common)["f"]


def _sentences(words: list[str]) -> list[str]:
    """Cut words into sentences as `rouge_chinese` does; white space among the words disappears."""
    return [" ".join(sentence.split()) for sentence in _cut_sentences(" ".join(words)) if sentence]
