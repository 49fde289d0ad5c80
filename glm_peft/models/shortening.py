"""
Shorten prompts and answers that are longer than allowed, without breaking their format.

Nothing is cut out of finished ids: the conversation or the text is shortened and encoded anew, so what comes out has
every special token and could have come from a shorter row. Texts are cut between characters, never within one.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable

from glm_peft.errors import UserError

# Tokens. One character more can make one token of two, so a longer beginning can have fewer; never by this many.
_SLACK = 32

# {"role": system, user, assistant or observation, "content": text}; see `tool_formats` for tools and their calls
Message = dict[str, str]
_KEPT = ("system", "tools")


def shorten_prompt(
    messages: list[Message], encode: Callable[[list[Message]], list[int]], max_length: int
) -> list[int]:
    """
    Encode a prompt without its oldest turns or, where its last turn alone is too long, without the end of that.

    Args:
        messages: the conversation; its system messages stay.
        encode: returns the ids of a conversation's prompt.
        max_length: the most tokens that the prompt may have.

    Raises:
        UserError: where not even one character of the last message finds room.
    """
    shorter = _without_oldest_turns(messages)
    # bisect wants ascending keys, and lengths fall with each turn that is left out: hence the signs.
    dropped = bisect_left(shorter, -max_length, key=lambda rest: -len(encode(rest)))
    if dropped < len(shorter):
        return encode(shorter[dropped])
    *earlier, last = shorter[-1] if shorter else messages

    def encode_last(content: str) -> list[int]:
        return encode([*earlier, {**last, "content": content}])

    return shorten_text(last["content"], encode_last, max_length, "--max_source_length")


def shorten_text(text: str, encode: Callable[[str], list[int]], max_length: int, flag: str) -> list[int]:
    """
    Encode the longest beginning of a text that stays within `max_length` tokens.

    Args:
        text: the text.
        encode: returns the ids of a text, together with the special tokens around it.
        max_length: the most tokens that there may be.
        flag: the flag that gave `max_length`, for the error message.

    Raises:
        UserError: where not even one character finds room.
    """
    encoded: dict[int, list[int]] = {}

    def count_tokens(characters: int) -> int:
        if characters not in encoded:
            encoded[characters] = encode(text[:characters])
        return len(encoded[characters])

    too_long = _find_end(len(text), count_tokens, max_length)
    # The range is always that of the whole text: as lengths do not only grow (see _SLACK), a search in another range
    # could end at another of the places where the limit is passed.
    characters = bisect_right(
        range(1, len(text) + 1), max_length, key=lambda n: count_tokens(n) if n < too_long else max_length + 1
    )
    if not characters:
        raise UserError(
            f"{flag} {max_length} is too short: one character and what the chat format puts around it take "
            f"{count_tokens(1)} tokens here; give a larger value."
        )
    return encoded[characters]


def _find_end(length: int, count_tokens: Callable[[int], int], max_length: int) -> int:
    """Return a number of characters from which on every beginning is too long, so that it need not be encoded."""
    # Encoding takes time in proportion to the text: a book cut to 64 tokens is not to be encoded whole a dozen times.
    end = 2 * max_length
    while 2 * end < length:
        if count_tokens(end) > max_length + _SLACK:
            return end
        end *= 2
    return length + 1


def _without_oldest_turns(messages: list[Message]) -> list[list[Message]]:
    """Return the conversation without its oldest turn, without its two oldest, …; system messages and tools stay."""
    # A turn begins at a user's message: an observation or an answer makes no sense without what it follows.
    spoken = [index for index, message in enumerate(messages) if message["role"] not in _KEPT]
    starts = [index for index in spoken[1:] if messages[index]["role"] == "user"]
    return [[m for index, m in enumerate(messages) if index >= start or m["role"] in _KEPT] for start in starts]
