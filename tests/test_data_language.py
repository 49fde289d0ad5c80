"""Which language is seen in the rows of a data set."""

import pytest

from glm_peft.preprocessing.conversations import Conversation, Split
from glm_peft.provenance.data_language import detect_languages, languages_of_splits


@pytest.mark.parametrize(
    "text, expected",
    [
        ("今天天气很好，我们去公园散步。", ["zh"]),
        ("類型#褲*顏色#白色", ["zh"]),
        ("类型#裤*材质#A-line skirt", ["zh"]),
        ("The weather is nice and we walk to the park.", ["en"]),
        (
            "Translate it to English, and be short: 今天天气很好，我们去公园散步。 The weather is good for the park.",
            ["zh", "en"],
        ),
        ("今日は天気がいいですね、公園に行きましょう。", []),
        ("Сегодня хорошая погода, и мы идём в парк.", []),
        ("Das Wetter ist heute schön, und wir gehen in den Park.", []),
        ("Il fait beau et nous allons au parc avec les enfants.", []),
        ("오늘은 날씨가 좋아서 공원에 갑니다.", []),
        ("1 + 1 = 2", []),
        ("", []),
    ],
)
def test_chinese_and_english_are_told_from_others(text, expected):
    assert detect_languages([text]) == expected


def test_of_the_splits_the_one_that_is_trained_on_counts():
    def split(name: str, text: str) -> Split:
        return Split(name, "rows", [Conversation([{"role": "user", "content": text}], "row 1", False)])

    chinese, english = split("train", "裤子很好看"), split("test", "The skirt is for you and it is good")
    assert languages_of_splits({"train": chinese, "test": english}) == ["zh"]
    assert languages_of_splits({"test": english}) == ["en"]
    assert languages_of_splits({}) == []
