"""Choose the rows that are held out of training for its evaluation."""

import hashlib
from collections import Counter
from collections.abc import Iterable

from glm_peft.errors import UserError


def choose_held_out(questions: Iterable[str], wanted: float, seed: int) -> set[str]:
    """
    Choose first questions, whose rows are held out.

    Rows that begin with the same question, such as the turns of one conversation or duplicates, stay on one side. The
    choice depends on the questions and the seed alone, not on the order of the rows.

    Args:
        questions: the first question of every row.
        wanted: share of the rows below 1, or their number.

    Raises:
        UserError: nothing would be left to train on, or nothing can be held out.
    """
    rows = Counter(questions)
    left = max(round(wanted * rows.total()), 1) if wanted < 1 else int(wanted)
    if left >= rows.total():
        raise UserError(
            f"--validation_split {wanted:g} would hold out {left} of {rows.total()} rows: give less, or a "
            "--validation_file of its own."
        )
    chosen = set()
    for question in sorted(rows, key=lambda question: _draw(question, seed)):
        if rows[question] <= left:
            chosen.add(question)
            left -= rows[question]
    if not chosen:
        raise UserError(
            f"--validation_split {wanted:g}: rows that begin with the same question stay together, and each question "
            f"has more rows than the {left} to hold out: give more, or a --validation_file of its own."
        )
    return chosen


def _draw(question: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{question}".encode()).digest()
