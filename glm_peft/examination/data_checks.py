"""Find what is odd in conversations: duplicates, overlaps of splits, answers that echo, suspicious characters."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from glm_peft.examination.near_duplicates import Sketch, find_near
from glm_peft.preprocessing.columns import describe_unread
from glm_peft.preprocessing.conversations import Conversation, Split

SHORTEST_ECHO = 4  # characters; a shorter question stands in many answers by right
FAR_LONGER = 10  # times the length that nine in ten texts have at most

_SUSPICIOUS = {
    "control characters": (re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"), "remove them"),
    # Decoders put this character where the bytes are none of their encoding: the text itself is lost.
    "U+FFFD, what a wrong decoding leaves": (re.compile("\ufffd"), "read the source again in its own encoding"),
    "mojibake, text decoded with the wrong encoding": (
        # UTF-8 read as Latin-1 or cp1252, two characters in a row; U+FFFD, or memory never written, read as GBK.
        re.compile(
            "[\u00c2-\u00f4](?:[\u0080-\u00bf\u0152-\u0178\u2013-\u203a\u20ac\u2122]){1,3}[\u00c2-\u00f4]|锟斤拷|烫烫烫"
        ),
        "read the source again in its own encoding",
    ),
    "byte order marks": (re.compile("\ufeff"), "remove them"),
    "zero-width and direction characters": (
        re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069]"),
        "remove them",
    ),
    "unusual white space": (re.compile("[\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f]"), "put plain spaces"),
    "HTML entities or tags": (
        re.compile(
            r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#[xX][0-9a-fA-F]{2,6});|</?(?:a|b|br|div|font|img|li|p|span|td|tr|ul)\b[^<>]*>"
        ),
        "unescape or strip them, unless they are wanted",
    ),
    "control tokens spelt out": (
        re.compile(
            r"\[(?:[gs]?MASK|/?INST)\]|<(?:/?s|s?[oe]op|pad|unk|bos|eos)>"
            r"|<\|(?:system|user|assistant|observation|endoftext|im_start|im_end)\|>"
        ),
        "remove them: they are read as plain text",
    ),
}

_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode categories: controls, formats, spaces, separators
_READ_MORE = "what of them belongs to the prompt or the answer must stand in columns that are read"
_MAY_DIFFER = f"columns that are not read may tell some apart: {_READ_MORE}"
_REWRITE = "write what is meant, or remove the rows"


@dataclass(frozen=True)
class Finding:
    """Rows with the same oddity: what it is, where they stand (such as `train.json, line 3`), and what to do."""

    what: str
    rows: list[str]
    advice: str


def check_split(split: Split) -> list[Finding]:
    """Run every check of one split; a finding without rows is left out."""
    checks = (
        find_unread,
        find_without_loss,
        find_duplicates,
        find_near_duplicates,
        find_echoes,
        find_far_longer,
        find_invisible,
        find_suspicious_characters,
    )
    findings = [finding for check in checks for finding in check(split)]
    return [finding for finding in findings if finding.rows]


def find_unread(split: Split) -> list[Finding]:
    """Find rows with columns that hold something and are not read."""
    rows = _where(split, lambda conversation: bool(conversation.unread))
    return [Finding(describe_unread(split.unread), rows, _READ_MORE)] if rows else []


def find_without_loss(split: Split) -> list[Finding]:
    """Find rows of which no answer is learnt, rows of which some are not, and rows that weigh them."""
    advice = "let an answer carry loss, or remove them: they are left out"
    some = _where(split, lambda conversation: bool(conversation.muted))
    weighed = _where(split, lambda conversation: any("weight" in message for message in conversation.messages))
    return [
        Finding("rows in which no answer carries loss", split.without_loss, advice),
        Finding("rows with answers that carry no loss", some, "look whether they are meant as context alone"),
        Finding("rows with answers of another weight than 1", weighed, "look whether their loss is to be multiplied"),
    ]


def find_duplicates(split: Split) -> list[Finding]:
    """Find rows that repeat an earlier row, and rows whose prompt stands earlier with another answer."""
    same_row, same_pair, other_answer, tells_apart = [], [], [], False
    first_of_row: dict[Hashable, str] = {}
    first_of_pair: dict[Hashable, str] = {}
    first_of_prompt: dict[Hashable, str] = {}
    for conversation in split:
        # The prompt with its history: the same question may have another answer after other turns.
        prompt, where = _prompt_key(conversation), conversation.where
        pair = (prompt, conversation.answer)
        row = (pair, conversation.unread)
        if row in first_of_row:
            same_row.append(_as_before(where, first_of_row[row]))
        elif pair in first_of_pair:
            same_pair.append(_as_before(where, first_of_pair[pair]))
        elif prompt in first_of_prompt:
            other_answer.append(_as_before(where, first_of_prompt[prompt]))
            tells_apart |= bool(conversation.unread)
        first_of_row.setdefault(row, where)
        first_of_pair.setdefault(pair, where)
        first_of_prompt.setdefault(prompt, where)
    advice = "keep them only if both are right"
    if tells_apart:
        advice = f"{_MAY_DIFFER}; else {advice}"
    return [
        Finding("rows that repeat an earlier row, prompt and answer", same_row, "remove them: they count twice"),
        Finding("rows that repeat an earlier row but for columns that are not read", same_pair, _READ_MORE),
        Finding("prompts that stand earlier with another answer", other_answer, advice),
    ]


def find_near_duplicates(split: Split) -> list[Finding]:
    """Find rows that are nearly equal to an earlier row, prompt and answer together."""
    rows = _near_rows(find_near(Sketch.draw(split.conversations, with_answers=True)))
    return [Finding("rows that are nearly an earlier row", rows, "keep one of them, unless both are meant")]


def check_overlaps(splits: Sequence[Split]) -> Iterator[tuple[str, list[Finding]]]:
    """Yield for every two splits a title and what they share: the same prompts, and prompts that are nearly so."""
    sketches = [Sketch.draw(split.conversations, with_answers=False) for split in splits] if len(splits) > 1 else []
    for (split, sketch), (other, of_other) in combinations(zip(splits, sketches, strict=False), 2):
        near = Finding(
            f"{other.name} prompts that are nearly one in {split.name}",
            _near_rows(find_near(of_other, sketch)),
            _overlap_advice(split, other),
        )
        found = [finding for finding in (find_overlap(split, other), near) if finding.rows]
        yield f"Overlap of {split.name} and {other.name}", found


def find_overlap(split: Split, other: Split) -> Finding:
    """Find rows of `split` whose prompt, with its history, is that of a row of `other`."""
    places: dict[Hashable, Conversation] = {}
    for conversation in other:
        places.setdefault(_prompt_key(conversation), conversation)
    shared = [(one, places[_prompt_key(one)]) for one in split if _prompt_key(one) in places]
    rows = [_as_before(one.where, earlier.where) for one, earlier in shared]
    advice = _overlap_advice(split, other)
    if any(one.unread != earlier.unread for one, earlier in shared):
        advice = f"{_MAY_DIFFER}; else {advice}"
    return Finding(f"{split.name} prompts that are in {other.name} too", rows, advice)


def find_echoes(split: Split) -> list[Finding]:
    """Find answers that contain the question (of `SHORTEST_ECHO` characters or more), or are nothing but it."""
    nothing_else, repeats = [], []
    for conversation in split:
        question, answer = _question(conversation), _answer(conversation)
        if answer == question:
            nothing_else.append(conversation.where)
        elif len(question) >= SHORTEST_ECHO and question in answer:
            repeats.append(conversation.where)
    return [
        Finding("answers that are the prompt and nothing else", nothing_else, "write the answers that are meant"),
        Finding("answers that repeat the prompt", repeats, "cut the prompt off, unless repeating it is the task"),
    ]


def find_far_longer(split: Split) -> Iterable[Finding]:
    """Find prompts and answers of more than `FAR_LONGER` times the characters that nine in ten have at most."""
    for name, text in (("prompts", _question), ("answers", _answer)):
        lengths = [(len(text(conversation)), conversation.where) for conversation in split]
        # The ninth decile and not the mean, which a single text of a million characters would move.
        usual = sorted(length for length, _ in lengths)[int(0.9 * (len(lengths) - 1))] if lengths else 0
        rows = [f"{where} ({length:,} characters)" for length, where in lengths if length > FAR_LONGER * usual > 0]
        advice = f"look whether several rows ran together: nine in ten have at most {usual:,} characters"
        yield Finding(f"{name} that are far longer than the others", rows, advice)


def find_invisible(split: Split) -> list[Finding]:
    """Find prompts and answers that are not empty, but have no visible character."""
    return [
        Finding("prompts without a visible character", _where(split, lambda x: _is_invisible(_question(x))), _REWRITE),
        Finding("answers without a visible character", _where(split, lambda x: _is_invisible(_answer(x))), _REWRITE),
    ]


def find_suspicious_characters(split: Split) -> Iterable[Finding]:
    """Find characters and marks that texts seldom hold on purpose, one finding for each kind."""
    rows: dict[str, list[str]] = defaultdict(list)
    for conversation in split:
        text = "\n".join(message["content"] for message in conversation.messages)
        for what, (pattern, _) in _SUSPICIOUS.items():
            if found := pattern.search(text):
                rows[what].append(f"{conversation.where} ({_spelt(found.group())})")
    return [Finding(what, rows[what], advice) for what, (_, advice) in _SUSPICIOUS.items()]


def _overlap_advice(split: Split, other: Split) -> str:
    if split.kind == other.kind == "train":
        return "keep them in one of the sources, or they count twice"
    return f"remove them from {other.name}, or its scores measure memory"


def _near_rows(pairs: Iterable[tuple[Conversation, Conversation, float]]) -> list[str]:
    # Rounded down: 100 % alike is what differs in white space, case or width alone.
    return [_as_before(one.where, other.where, f", {int(100 * share)} % alike") for one, other, share in pairs]


def _as_before(where: str, earlier: str, more: str = "") -> str:
    """Return two places as text, without the file of the second where it is that of the first."""
    file, _, _ = where.rpartition(", ")
    return f"{where} (as {earlier.removeprefix(f'{file}, ')}{more})"


def _spelt(found: str) -> str:
    """Spell what was found so that even an invisible character can be read: U+200B, or the text itself."""
    # Two characters and more are mojibake, tags or control tokens, which can be read as they are.
    return f"U+{ord(found):04X}" if len(found) == 1 else repr(found[:20])


def _where(split: Split, is_so: Callable[[Conversation], bool]) -> list[str]:
    return [conversation.where for conversation in split if is_so(conversation)]


def _prompt_key(conversation: Conversation) -> Hashable:
    return tuple((message["role"], message["content"]) for message in conversation.prompt)


def _question(conversation: Conversation) -> str:
    return conversation.prompt[-1]["content"].strip()


def _answer(conversation: Conversation) -> str:
    return (conversation.answer or "").strip()


def _is_invisible(text: str) -> bool:
    return bool(text) and all(unicodedata.category(character) in _INVISIBLE for character in text)
