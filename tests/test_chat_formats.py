"""Messages to ids: published prompts, literal examples, frames that survive truncation, content that stays text."""

import json

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import glm_peft  # noqa: F401  registers the tokenizers
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import CHAT_FORMATS, get_chat_format

SENTENCES = [
    "晚上睡不着怎么办，好看的裙子。",
    "你好！有什么可以帮助你的？",
    "Write a poem about rain",
    "[Round 1] 问：答：",
]
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM4_TOKENS = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLE_TOKENS]
EVERY_CONTROL_TOKEN = [*GLM4_TOKENS, "sop", "eop", "</s>", "<pad>", "<unk>"]

# name: folder of the published tokenizer, ids of the prompt 晚上睡不着怎么办, ids of the answer 你好\n再见
LITERAL = {
    "chatglm": (
        "chatglm-6b",
        [74747, 83400, 66846, 130001, 130004],
        [5, 74874, 4, 72798, 130005],
    ),
    "chatglm2": (
        "chatglm2-6b",
        [64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211]
        + [32820, 54266, 35153, 13, 13, 55437, 31211],
        [36474, 54591, 13, 40637, 2],
    ),
    "chatglm3": (
        "chatglm3-6b",
        [64790, 64792, 64795, 30910, 13, 30910, 32820, 54266, 35153, 64796],
        [30910, 13, 36474, 54591, 13, 40637, 2],
    ),
    "glm4": (
        "glm-4-9b-chat",
        [151331, 151333, 151336, 198, 101160, 120410, 103298, 151337],
        [198, 109377, 198, 110559, 151336],
    ),
}
GENERATIONS = list(LITERAL)


def conversation(*contents, system=None):
    """Contents by turns, the first and the last from the user."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [
        {"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)
    ]


def write_folder(folder, model_file, trained, recorded_name):
    """A folder in the published layout; without a recorded name nothing tells ChatGLM2 from ChatGLM3."""
    folder.mkdir()
    trained.rename(folder / model_file)
    settings = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": recorded_name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    return folder


def train_sentencepiece(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_prefix=str(folder / "trained"),
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "trained.model"


def tiny_chatglm(folder):
    options = {
        "model_type": "unigram",
        "vocab_size": 420,
        "pad_id": 3,
        "control_symbols": ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        "user_defined_symbols": ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))],
    }
    folder = write_folder(
        folder / "tiny", "ice_text.model", train_sentencepiece(folder, **options), "THUDM/chatglm-6b"
    )
    return AutoTokenizer.from_pretrained(folder)


def tiny_chatglm2(folder, recorded_name="THUDM/chatglm2-6b"):
    trained = train_sentencepiece(
        folder,
        model_type="bpe",
        vocab_size=340,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return AutoTokenizer.from_pretrained(write_folder(folder / "tiny", "tokenizer.model", trained, recorded_name))


def tiny_chatglm3(folder):
    return tiny_chatglm2(folder, "THUDM/chatglm3-6b-32k")


def tiny_native_glm4(folder, special_tokens=GLM4_TOKENS):
    """A stock fast tokenizer as GLM-4-0414 has it: byte-level BPE, special tokens after the vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


TINY = {
    "chatglm": tiny_chatglm,
    "chatglm2": tiny_chatglm2,
    "chatglm3": tiny_chatglm3,
    "glm4": tiny_native_glm4,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One tokenizer a generation, trained in the run."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in TINY.items()}


@pytest.fixture(scope="module")
def published(reference_tokenizers):
    """The published tokenizers."""
    return {
        name: AutoTokenizer.from_pretrained(reference_tokenizers / folder) for name, (folder, *_) in LITERAL.items()
    }


def frame_of(name, ids):
    """The part of a prompt's ids that no truncation may touch: its beginning and its end."""
    first, last = {"chatglm": (0, 2), "chatglm2": (2, 4), "chatglm3": (2, 1), "glm4": (2, 1)}[name]
    return ids[:first], ids[len(ids) - last :]


@pytest.mark.parametrize("name", GENERATIONS)
def test_prompts_are_the_published_ids(published, reference_tokenizers, name):
    tokenizer = published[name]
    lines = json.loads((reference_tokenizers / LITERAL[name][0] / "expected_chat.json").read_text(encoding="utf-8"))
    assert len(lines) >= 9
    for line in lines:
        contents = [content for turn in line["history"] for content in turn]
        messages = conversation(*contents, line["query"], system=line.get("system"))
        assert get_chat_format(tokenizer).encode_prompt(tokenizer, messages).ids == line["ids"], messages


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_literal_example(published, name):
    tokenizer, chat_format = published[name], CHAT_FORMATS[name]
    _, prompt_ids, answer_ids = LITERAL[name]
    prompt = chat_format.encode_prompt(tokenizer, conversation("晚上睡不着怎么办"))
    answer = chat_format.encode_answer(tokenizer, "你好\n再见")
    assert (prompt.ids, prompt.truncated) == (prompt_ids, False)
    assert (answer.ids, answer.truncated) == (answer_ids, False)


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("answer", ["你好", "一\n\n二\n三", "def f():\n    return 1", "🙂 <|user|> [gMASK]"])
def test_an_answer_comes_back_from_its_ids(published, name, answer):
    tokenizer, chat_format = published[name], CHAT_FORMATS[name]
    ids = chat_format.encode_answer(tokenizer, answer).ids
    assert ids[-1] == chat_format.stop_token_ids(tokenizer)[0]
    assert chat_format.clean_answer(tokenizer.decode(ids[:-1])) == answer
    assert chat_format.clean_answer(tokenizer.decode(ids, skip_special_tokens=True)) == answer


@pytest.mark.parametrize(
    "name, ids",
    [("chatglm", [130005]), ("chatglm2", [2]), ("chatglm3", [2, 64795, 64797]), ("glm4", [151336, 151329, 151338])],
)
def test_generation_ends_at_every_end_token(published, name, ids):
    assert CHAT_FORMATS[name].stop_token_ids(published[name]) == ids


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("tokenizers", ["tiny", "published"])
def test_control_tokens_in_content_stay_text(request, tokenizers, name):
    tokenizer, chat_format = request.getfixturevalue(tokenizers)[name], CHAT_FORMATS[name]
    written = "".join(EVERY_CONTROL_TOKEN)
    names = {*EVERY_CONTROL_TOKEN, *chat_format.frame_tokens} - ({"sop", "eop"} - {*chat_format.frame_tokens})
    controls = {tokenizer.convert_tokens_to_ids(token) for token in names} - {None, tokenizer.unk_token_id}

    def count(messages):
        ids = chat_format.encode_prompt(tokenizer, messages).ids + chat_format.encode_answer(tokenizer, written).ids
        return sum(index in controls for index in ids)

    quiet = [index for index in chat_format.encode_answer(tokenizer, written).ids[:-1] if index in controls]
    assert quiet == []
    assert count(conversation(written, written, written, system=written)) == count(
        conversation("a", "b", "c", system="d")
    )


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("tokenizers", ["tiny", "published"])
def test_no_length_breaks_the_frame_of_a_prompt(request, tokenizers, name):
    tokenizer, chat_format = request.getfixturevalue(tokenizers)[name], CHAT_FORMATS[name]
    messages = conversation("你好", "你好！\n有什么可以帮助你的？", "晚上睡不着怎么办🙂 Write a poem", system="助手")
    whole = chat_format.encode_prompt(tokenizer, messages).ids
    shorter = [
        chat_format.encode_prompt(tokenizer, conversation(messages[-1]["content"][:length], system="助手")).ids
        for length in range(1, len(messages[-1]["content"]) + 1)
    ]
    for max_length in range(len(shorter[0]), len(whole)):
        encoded = chat_format.encode_prompt(tokenizer, messages, max_length)
        assert encoded.truncated and len(encoded.ids) <= max_length
        assert encoded.ids in shorter
        if name != "chatglm":
            assert frame_of(name, encoded.ids) == frame_of(name, whole)
    assert not chat_format.encode_prompt(tokenizer, messages, len(whole)).truncated


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_tail_of_a_long_prompt_is_the_published_tail(published, name):
    _, prompt_ids, _ = LITERAL[name]
    encoded = CHAT_FORMATS[name].encode_prompt(published[name], conversation("晚上睡不着怎么办" * 50), max_length=64)
    assert encoded.truncated and 60 <= len(encoded.ids) <= 64
    assert frame_of(name, encoded.ids) == frame_of(name, prompt_ids)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_oldest_turns_go_first_and_whole(tiny, name):
    tokenizer, chat_format = tiny[name], CHAT_FORMATS[name]
    contents = ["问题一", "回答一", "问题二", "回答二", "问题三"]

    def ids_of(contents):
        return chat_format.encode_prompt(tokenizer, conversation(*contents, system="助手")).ids

    for dropped in (2, 4):
        expected = ids_of(contents[dropped:])
        messages = conversation(*contents, system="助手")
        assert chat_format.encode_prompt(tokenizer, messages, len(expected)).ids == expected
        assert chat_format.encode_prompt(tokenizer, messages, len(ids_of(contents[dropped - 2 :])) - 1).ids == expected


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_length_that_does_not_hold_the_frame_is_refused(tiny, name):
    tokenizer, chat_format = tiny[name], CHAT_FORMATS[name]
    needed = len(chat_format.encode_prompt(tokenizer, conversation("你")).ids)
    with pytest.raises(UserError, match=f"--max_source_length {needed - 1} is too short.* {needed} tokens"):
        chat_format.encode_prompt(tokenizer, conversation("你好，怎么办"), needed - 1)
    needed = len(chat_format.encode_answer(tokenizer, "你").ids)
    with pytest.raises(UserError, match=f"--max_target_length {needed - 1} is too short.* {needed} tokens"):
        chat_format.encode_answer(tokenizer, "你好，怎么办", needed - 1)


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_cut_answer_ends_with_its_end_token_and_between_characters(tiny, name):
    tokenizer, chat_format = tiny[name], CHAT_FORMATS[name]
    answer = "你好🙂🙂再见\n晚上"
    whole = chat_format.encode_answer(tokenizer, answer).ids
    shorter = [chat_format.encode_answer(tokenizer, answer[:length]).ids for length in range(1, len(answer) + 1)]
    for max_length in range(len(shorter[0]), len(whole)):
        encoded = chat_format.encode_answer(tokenizer, answer, max_length)
        assert encoded.truncated and len(encoded.ids) <= max_length
        assert encoded.ids in shorter and encoded.ids[-1] == whole[-1]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "plain"])
def test_without_roles_a_system_message_stands_before_the_first_question(tiny, name):
    tokenizer = tiny["chatglm2" if name == "plain" else name]
    ids = CHAT_FORMATS[name].encode_prompt(tokenizer, conversation("你好", system="助手")).ids
    assert ids == CHAT_FORMATS[name].encode_prompt(tokenizer, conversation("助手\n你好")).ids


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_an_observation_is_a_block_of_its_own(tiny, name):
    tokenizer, chat_format = tiny[name], CHAT_FORMATS[name]
    messages = conversation("你好", "好") + [{"role": "observation", "content": "问"}]
    ids = chat_format.encode_prompt(tokenizer, messages).ids
    asked = len(chat_format.encode_prompt(tokenizer, conversation("你好")).ids) - 1
    roles = [token for token in tokenizer.convert_ids_to_tokens(ids[asked:]) if token in ROLE_TOKENS]
    assert roles == ["<|assistant|>", "<|observation|>", "<|assistant|>"]


@pytest.mark.parametrize(
    "name, roles",
    [
        ("chatglm", "user, user"),
        ("chatglm2", "user, assistant"),
        ("chatglm2", "user, assistant, observation"),
        ("chatglm3", "user, assistant"),
        ("glm4", "user, tool"),
        ("glm4", ""),
        ("plain", "user, assistant, user"),
    ],
)
def test_a_conversation_that_the_format_cannot_express_is_refused(tiny, name, roles):
    messages = [{"role": role, "content": "你好"} for role in roles.split(", ") if role]
    with pytest.raises(UserError, match=f"The chat format {name} takes .* are {roles or 'none'}: correct them"):
        CHAT_FORMATS[name].encode_prompt(tiny.get(name, tiny["chatglm2"]), messages)


def test_the_line_feed_of_glm4_is_encoded_with_what_follows(published):
    tokenizer, chat_format = published["glm4"], CHAT_FORMATS["glm4"]
    two_line_feeds, end = 271, 151336
    assert chat_format.encode_answer(tokenizer, "\n你好").ids == [two_line_feeds, 109377, end]
    ids = chat_format.encode_prompt(tokenizer, conversation("\n你好")).ids
    assert ids == [151331, 151333, 151336, two_line_feeds, 109377, 151337]


def test_the_line_feed_of_chatglm3_is_encoded_by_itself(published):
    ids = CHAT_FORMATS["chatglm3"].encode_answer(published["chatglm3"], "\n你好").ids
    assert ids == [30910, 13, 30910, 13, 39701, 2]


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "glm4"])
def test_an_empty_system_message_leaves_no_trace(tiny, name):
    ids = CHAT_FORMATS[name].encode_prompt(tiny[name], conversation("你好", system="")).ids
    assert ids == CHAT_FORMATS[name].encode_prompt(tiny[name], conversation("你好")).ids


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_plain_format_is_the_bare_question_and_eos(tiny, name):
    tokenizer, plain = tiny[name], get_chat_format(tiny[name], "plain")
    assert plain.encode_prompt(tokenizer, conversation("你好")).ids == tokenizer("你好")["input_ids"]
    assert plain.encode_answer(tokenizer, "好").ids[-1:] == plain.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_tokenizer_tells_its_format(tiny, name):
    assert get_chat_format(tiny[name]) is CHAT_FORMATS[name]


def test_the_flag_wins_over_what_the_tokenizer_tells(tiny):
    assert get_chat_format(tiny["chatglm3"], "chatglm2") is CHAT_FORMATS["chatglm2"]


def test_an_unknown_generation_is_never_guessed(tmp_path):
    tokenizer = tiny_chatglm2(tmp_path, recorded_name=None)
    with pytest.raises(UserError, match="--chat_format, one of chatglm, chatglm2, chatglm3, glm4, plain"):
        get_chat_format(tokenizer)
    assert get_chat_format(tokenizer, "chatglm2") is CHAT_FORMATS["chatglm2"]


def test_a_stock_tokenizer_without_the_tokens_is_never_guessed(tmp_path):
    with pytest.raises(UserError, match="--chat_format"):
        get_chat_format(tiny_native_glm4(tmp_path, ["<|endoftext|>", "<|user|>", "<|assistant|>"]))


def test_an_unknown_name_is_refused_with_the_choices(tiny):
    with pytest.raises(UserError, match="--chat_format llama is not .* chatglm, chatglm2, chatglm3, glm4, plain"):
        get_chat_format(tiny["chatglm2"], "llama")


@pytest.mark.parametrize(
    "name, other, token",
    [("chatglm2", "chatglm", "<sop>"), ("chatglm", "chatglm2", "sop"), ("glm4", "chatglm3", "sop")],
)
def test_a_format_of_another_tokenizer_is_refused(tiny, name, other, token):
    with pytest.raises(UserError, match=f"has no token {token}, which the chat format needs"):
        get_chat_format(tiny[name], other)
