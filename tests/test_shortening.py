"""Shortened texts are what a search that encodes every step of the way finds, in fewer and shorter encodings."""

import random
from bisect import bisect_right

import pytest
from transformers import AutoTokenizer

import glm_peft  # noqa: F401
from glm_peft.errors import UserError
from glm_peft.models.shortening import shorten_text

PIECES = (
    "这件衬衫的颜色是白色，",
    "internationalization ",
    "    ",
    "-----",
    "1234567 ",
    "\n\n",
    "🙂",
    "naïve café, ",
    "裙",
)
TOKENIZERS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")


def draw_texts(number: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.choice((20, 60, 400)))) for _ in range(number)]


def search_everywhere(text: str, encode, max_length: int) -> list[int]:
    ends = range(1, len(text) + 1)
    return encode(text[: bisect_right(ends, max_length, key=lambda end: len(encode(text[:end])))])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("max_length", [5, 16, 64])
def test_the_ids_are_those_of_a_search_in_the_whole_text(reference_tokenizers, name, max_length):
    tokenizer = AutoTokenizer.from_pretrained(reference_tokenizers / name)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for text in draw_texts(40):
        if len(encode(text)) > max_length:
            assert shorten_text(text, encode, max_length, "--x") == search_everywhere(text, encode, max_length)


def test_a_long_text_is_encoded_at_its_beginning_only_and_never_twice():
    encoded = []

    def encode(text: str) -> list[int]:
        encoded.append(len(text))
        return [ord(character) for character in text]

    assert len(shorten_text("x" * 100_000, encode, 64, "--x")) == 64
    assert max(encoded) <= 256
    assert len(encoded) == len(set(encoded))


def test_a_limit_without_room_for_a_character_is_refused():
    with pytest.raises(UserError, match="--x 2 is too short: one character .* take 3 tokens here"):
        shorten_text("abcdef" * 100, lambda text: [0, 0, *range(len(text))], 2, "--x")
