"""
Find texts that are nearly equal, in linear time: MinHash over pieces of three characters, with banding.

After Broder, "On the resemblance and containment of documents" (1997). What shares a band is a candidate only: the
similarity that is told is exact.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glm_peft.preprocessing.conversations import Conversation
from glm_peft.preprocessing.messages import Message

SIMILARITY = 0.8  # pieces that stand in both texts, as a share of those that stand in one of them (Jaccard's)

_PIECE = 3  # characters
# Texts of similarity s share one of the bands with a probability of 1 - (1 - s^4)^12: 0.998 at 0.8, and 0.54 at 0.5.
_BANDS, _HASHES_PER_BAND = 12, 4
_LEAST_EQUAL_HASHES = 0.65  # at which the exact similarity is computed: 0.8 gives fewer in 1 of 200 pairs
_NEIGHBOURS = 4  # on each side, of the texts that share a band: where thousands do, not all of them are compared
_BLOCK = 1 << 18  # characters that are hashed at once: what is made of them stays in the processor's cache
_MOST = np.iinfo(np.uint32).max

_random = np.random.default_rng(0)
_FACTORS = _random.integers(_MOST, size=_BANDS * _HASHES_PER_BAND, dtype=np.uint32) | np.uint32(1)
_SUMMANDS = _random.integers(_MOST, size=_BANDS * _HASHES_PER_BAND, dtype=np.uint32)
_MIXERS = _random.integers(_MOST, size=_PIECE + _HASHES_PER_BAND, dtype=np.uint32) | np.uint32(1)


@dataclass(frozen=True)
class Sketch:
    """
    Rows with the hashes of their texts.

    Args:
        rows: n of them.
        with_answers: whether rows are compared as a whole, or by their prompts alone.
        identities: a hash of the whole of each [n], the same where nothing differs.
        bands: hashes of the bands [n, 12].
        hashes: the low bytes of the smallest hashes [n, 48].
    """

    rows: Sequence[Conversation]
    with_answers: bool
    identities: np.ndarray
    bands: np.ndarray
    hashes: np.ndarray

    @classmethod
    def draw(cls, rows: Sequence[Conversation], with_answers: bool) -> "Sketch":
        """Hash the rows, or their prompts alone."""
        identities = np.empty(len(rows), np.int64)
        bands = np.empty((len(rows), _BANDS), np.uint32)
        hashes = np.empty((len(rows), _BANDS * _HASHES_PER_BAND), np.uint8)
        done = 0
        for block in _blocks(row.messages if with_answers else row.prompt for row in rows):
            place = slice(done, done := done + len(block))
            smallest = _smallest_hashes(list(map(_texts, block)))
            identities[place] = [hash(tuple(tuple(message.items()) for message in row)) for row in block]
            hashes[place] = smallest.astype(np.uint8)
            grouped = smallest.reshape(-1, _BANDS, _HASHES_PER_BAND)
            bands[place] = _mix((grouped * _MIXERS[_PIECE:]).sum(axis=2, dtype=np.uint32))
        return cls(rows, with_answers, identities, bands, hashes)

    def __getitem__(self, places: np.ndarray) -> "Sketch":
        """Return the sketch of some of the rows [m]."""
        own = self.identities[places], self.bands[places], self.hashes[places]
        return Sketch([self.rows[place] for place in places], self.with_answers, *own)

    def distinct(self) -> "Sketch":
        """Return the sketch of the rows that are equal to no earlier one."""
        return self[np.sort(np.unique(self.identities, return_index=True)[1])]


def find_near(sketch: Sketch, others: Sketch | None = None) -> list[tuple[Conversation, Conversation, float]]:
    """
    Find rows that are nearly equal to another one, but equal to none.

    Args:
        others: where the other one is looked for; `None` for the earlier ones of the same rows.

    Returns:
        Each row with one that is nearly equal, and their similarity, `SIMILARITY` or more.
    """
    distinct = (others or sketch).distinct()
    own = sketch[np.flatnonzero(~np.isin(sketch.identities, others.identities))] if others else distinct
    nearest = _nearest(own, distinct)
    pairs = [(own.rows[place], distinct.rows[nearest[place]]) for place in np.flatnonzero(nearest >= 0)]
    compared = [[row.messages if sketch.with_answers else row.prompt for row in pair] for pair in pairs]
    found = [(*pair, compute_similarity(*messages)) for pair, messages in zip(pairs, compared, strict=True)]
    return [pair for pair in found if pair[2] >= SIMILARITY]


def compute_similarity(one: list[Message], other: list[Message]) -> float:
    """Return how many pieces stand in both, as a share of those that stand in one of them."""
    first, second = (
        {text[start : start + _PIECE] for text in _texts(messages) for start in range(len(text) - _PIECE + 1)}
        for messages in (one, other)
    )
    return len(first & second) / len(first | second)


def _texts(messages: list[Message]) -> list[str]:
    """Return what is compared: without white space and what Unicode calls differences of case and width."""
    # System text and tools are often the same in all rows, and longer than the question.
    texts = [message["content"] for message in messages if message["role"] not in ("system", "tools")]
    plain = ("".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    return [text.ljust(_PIECE, "\0") for text in plain]


def _blocks(rows: Iterator[list[Message]]) -> Iterator[list[list[Message]]]:
    block, size = [], 0
    for messages in rows:
        block.append(messages)
        size += sum(len(message["content"]) for message in messages)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _smallest_hashes(rows: list[list[str]]) -> np.ndarray:
    """Return the smallest of each of the 48 hashes over the pieces of every row's texts [n, 48]."""
    texts = [text for row in rows for text in row]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    pieces = np.zeros(len(codes), np.uint32)
    pieces[: 1 - _PIECE] = sum(codes[at : len(codes) - _PIECE + 1 + at] * _MIXERS[at] for at in range(_PIECE))
    is_whole = np.ones(len(codes), bool)
    for at in range(1, _PIECE):
        is_whole[np.cumsum(lengths) - at] = False  # such a piece would run into the next text
    pieces = _mix(pieces)[is_whole]
    counts = np.add.reduceat(lengths - _PIECE + 1, np.cumsum([0, *map(len, rows)])[:-1])
    starts = np.cumsum(counts) - counts
    hashes = [np.minimum.reduceat(pieces * a + b, starts) for a, b in zip(_FACTORS, _SUMMANDS, strict=True)]
    return np.stack(hashes, axis=1)


def _mix(values: np.ndarray) -> np.ndarray:
    """Return 32-bit values of which every bit depends on all bits (the finalizer of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    return values ^ (values >> np.uint32(16))


def _nearest(sketch: Sketch, others: Sketch) -> np.ndarray:
    """Return for each row [n] the place of the likeliest of `others`, or -1; among its own rows, of an earlier one."""
    best, nearest = np.full(len(sketch.rows), _LEAST_EQUAL_HASHES), np.full(len(sketch.rows), -1)
    for band in range(_BANDS if len(others.rows) else 0):
        own, keys = _band_keys(sketch.bands, band), _band_keys(others.bands, band)
        order = np.argsort(keys, kind="stable")
        start = np.searchsorted(keys[order], own)
        for step in range(-_NEIGHBOURS, _NEIGHBOURS):
            candidates = order[np.clip(start + step, 0, len(order) - 1)]
            shares_band = others.bands[candidates, band] == sketch.bands[:, band]
            if others is sketch:
                shares_band &= candidates < np.arange(len(candidates))
            rows = np.flatnonzero(shares_band)
            equal = (sketch.hashes[rows] == others.hashes[candidates[rows]]).mean(axis=1)
            better = rows[equal > best[rows]]
            best[better], nearest[better] = equal[equal > best[rows]], candidates[better]
    return nearest


def _band_keys(bands: np.ndarray, band: int) -> np.ndarray:
    """Return numbers [n] that sort by a band, and of many texts that share it bring those together that share two."""
    return bands[:, band].astype(np.uint64) << np.uint64(32) | bands[:, (band + 1) % _BANDS]
