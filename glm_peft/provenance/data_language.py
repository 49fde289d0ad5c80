"""In which language the rows of a data set are, as far as their letters and commonest words tell it."""

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

_LEAST_SHARE = 0.2  # of all words, for a language to be named
_LEAST_COMMON = 0.08  # of the words in Latin letters: English has some 20 % of these, other languages few
_KANA_SHARE = 0.05  # beside Chinese characters, it is Japanese
_SAMPLED_ROWS = 2000
_HAN, _KANA = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile(r"[\u3040-\u30ff]")
_OTHER = re.compile(r"[\u0370-\u1cff\uac00-\ud7af]")  # Greek, Cyrillic, Arabic, Hangul, …
_WORD = re.compile(r"[A-Za-z\u00c0-\u024f']+")
_COMMON = ("the", "of", "and", "to", "that", "it", "for", "are", "with", "this", "have", "you", "not", "be")


def detect_languages(texts: Iterable[str]) -> list[str]:
    """
    Of `zh` and `en` those that the texts are in, by ISO 639-1; other languages are not known and not named.

    A Chinese character counts as a word. A language is named from a fifth of the words on.
    """
    han, kana, other, words = 0, 0, 0, []
    for text in texts:
        han, kana, other = han + _count(_HAN, text), kana + _count(_KANA, text), other + _count(_OTHER, text) / 4
        words += _WORD.findall(text.lower())
    total = han + kana + other + len(words)
    if not total:
        return []
    is_chinese = han / total >= _LEAST_SHARE and kana < _KANA_SHARE * (han + kana)
    common = sum(word in _COMMON for word in words)
    is_english = len(words) / total >= _LEAST_SHARE and common >= _LEAST_COMMON * len(words)
    return [name for name, is_there in (("zh", is_chinese), ("en", is_english)) if is_there]


def languages_of_splits(splits: Mapping[str, Any]) -> list[str]:
    """Those of the rows that are trained on, or of all rows where there is no training."""
    used = [splits["train"]] if "train" in splits else list(splits.values())
    rows = islice((conversation for split in used for conversation in split), _SAMPLED_ROWS)
    return detect_languages(message["content"] for conversation in rows for message in conversation.messages)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return len(pattern.findall(text))
