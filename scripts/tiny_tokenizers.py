"""Small tokenizers in the published layouts, and what a model has to know of a tokenizer: its size and special ids."""

import base64
import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from glm_peft.errors import UserError

CHATGLM_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
CHATGLM_WHITESPACE = ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
GLM4_SPECIAL = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES, *MEDIA)
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_0414_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PUBLISHED_VOCAB = {"chatglm": 130528, "chatglm2": 65024, "chatglm3": 65024, "glm4": 151552, "glm4_0414": 151552}
MAIN_FILES = {
    "chatglm": "ice_text.model",
    "chatglm2": "tokenizer.model",
    "chatglm3": "tokenizer.model",
    "glm4": "tokenizer.model",
    "glm4_0414": "tokenizer.json",
}
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BYTES = 256
# Pieces beside text: <unk> <s> </s> <pad> <n> for ChatGLM-6B, <unk> <s> </s> for ChatGLM2 and 3.
RESERVED = {
    "chatglm": 5 + len(CHATGLM_CONTROL) + len(CHATGLM_WHITESPACE) + BYTES,
    "chatglm2": 3 + len(CHATGLM2_SPECIAL) + BYTES,
    "chatglm3": 3 + len(CHATGLM2_SPECIAL) + len(ROLES) + BYTES,
    "glm4": len(GLM4_SPECIAL) + BYTES,
    "glm4_0414": len(GLM4_SPECIAL) + BYTES,
}
FEWEST_TEXT_TOKENS = 16


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model's configuration takes from its tokenizer."""

    size: int  # ids in use: 0 … size - 1
    ids: dict[str, int]  # of the special tokens
    shift: int = 0  # ids before the first piece: `num_image_tokens` of the older ChatGLM-6B revision


def write_tokenizer(folder: Path, generation: str, lines: Sequence[str], max_tokens: int) -> TokenizerFacts:
    """
    Trains a tokenizer of at most `max_tokens` ids on `lines` and writes it to `folder` in the published layout.

    Raises:
        UserError: If `max_tokens` leaves no room for text beside the special tokens and the 256 bytes.
    """
    text_tokens = max_tokens - RESERVED[generation]
    if text_tokens < FEWEST_TEXT_TOKENS:
        raise UserError(
            f"--vocab_size {max_tokens} is too small for {generation}: its special tokens and 256 bytes take "
            f"{RESERVED[generation]}; give at least {RESERVED[generation] + FEWEST_TEXT_TOKENS}."
        )
    lines = keep_common_characters(lines, text_tokens // 2)
    if generation == "glm4_0414":
        _write_glm4_0414(folder, lines, text_tokens)
    elif generation == "glm4":
        _write_glm4(folder, lines, text_tokens)
    elif generation == "chatglm":
        _write_chatglm(folder, lines, text_tokens)
    else:
        _write_chatglm2(folder, generation, lines, text_tokens)
    return read_tokenizer(folder, generation)


def copy_tokenizer(source: Path, folder: Path, generation: str) -> None:
    """Copies a published tokenizer's files from `source` to `folder`."""
    for name in (MAIN_FILES[generation], *OTHER_FILES):
        if (source / name).is_file():
            # copyfile leaves the mode alone: a read-only original gives a copy that can be replaced.
            shutil.copyfile(source / name, folder / name)


def read_tokenizer(folder: Path, generation: str) -> TokenizerFacts:
    """
    The size and special ids of the tokenizer files in `folder`.

    Raises:
        UserError: If `folder` lacks a file that this generation's tokenizer is in.
    """
    for name in (MAIN_FILES[generation], "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"the tokenizer folder {folder} has no {name}, which a {generation} tokenizer needs.")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    main_file = folder / MAIN_FILES[generation]
    if generation == "glm4_0414":
        tokenizer = Tokenizer.from_file(str(main_file))
        return TokenizerFacts(tokenizer.get_vocab_size(), {name: tokenizer.token_to_id(name) for name in GLM4_SPECIAL})
    if generation == "glm4":
        ids = {token["content"]: int(index) for index, token in settings["added_tokens_decoder"].items()}
        return TokenizerFacts(max(ids.values()) + 1, ids)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(main_file))
    if generation == "chatglm":
        shift = settings.get("num_image_tokens", 0)
        ids = {name: pieces.piece_to_id(name) + shift for name in ("<pad>", *CHATGLM_CONTROL)}
        return TokenizerFacts(len(pieces) + shift, ids, shift)
    special = CHATGLM2_SPECIAL + (ROLES if generation == "chatglm3" else ())
    ids = {name: len(pieces) + number for number, name in enumerate(special)}
    return TokenizerFacts(len(pieces) + len(special), ids | {"<unk>": pieces.unk_id(), "</s>": pieces.eos_id()})


def keep_common_characters(lines: Sequence[str], count: int) -> list[str]:
    """The lines without their rare characters: every trainer here wants a token for each character that it meets."""
    frequency = Counter(character for line in lines for character in line)
    kept = {character for character, _ in frequency.most_common(count)}
    return ["".join(character for character in line if character in kept) for line in lines]


def _train_sentencepiece(lines: Sequence[str], **options: object) -> sentencepiece_model_pb2.ModelProto:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())


def _write_chatglm(folder: Path, lines: Sequence[str], text_tokens: int) -> None:
    """The trainer puts the bytes before the text; the published file has control, whitespace, bytes after it."""
    trained = _train_sentencepiece(
        lines, model_type="unigram", vocab_size=5 + BYTES + text_tokens, pad_id=3, user_defined_symbols=["<n>"]
    )
    piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    control = [piece(piece=name, score=0.0, type=piece.CONTROL) for name in CHATGLM_CONTROL]
    whitespace = [piece(piece=name, score=0.0, type=piece.USER_DEFINED) for name in CHATGLM_WHITESPACE]
    # Stable: the five pieces before the bytes stay the first.
    by_kind = sorted(trained.pieces, key=lambda each: each.type == piece.BYTE)
    words, byte_pieces = by_kind[:-BYTES], by_kind[-BYTES:]
    laid_out = [*words, *control, *whitespace, *byte_pieces]
    del trained.pieces[:]
    trained.pieces.extend(laid_out)
    (folder / MAIN_FILES["chatglm"]).write_bytes(trained.SerializeToString())
    tokens = {"bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>", "gmask_token": "[gMASK]"}
    tokens |= {"mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>", "num_image_tokens": 0}
    _write_settings(folder, "THUDM/chatglm-6b", "ChatGLMTokenizer", tokens)


def _write_chatglm2(folder: Path, generation: str, lines: Sequence[str], text_tokens: int) -> None:
    trained = _train_sentencepiece(
        lines,
        model_type="bpe",
        vocab_size=3 + BYTES + text_tokens,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    (folder / MAIN_FILES[generation]).write_bytes(trained.SerializeToString())
    _write_settings(folder, f"THUDM/{generation}-6b", "ChatGLMTokenizer", {})


def _train_bytes(lines: Sequence[str], text_tokens: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BYTES + text_tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _byte_of_character() -> dict[str, int]:
    """The byte behind each character of byte-level BPE: printable ones are themselves, the others U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _write_glm4(folder: Path, lines: Sequence[str], text_tokens: int) -> None:
    vocabulary = _train_bytes(lines, text_tokens).get_vocab()
    byte_of = _byte_of_character()
    ranks = []
    for token, rank in sorted(vocabulary.items(), key=lambda item: item[1]):
        encoded = base64.b64encode(bytes(byte_of[character] for character in token)).decode()
        ranks.append(f"{encoded} {rank}\n")
    (folder / MAIN_FILES["glm4"]).write_text("".join(ranks), encoding="ascii")
    added = {str(len(ranks) + number): _added_token(name) for number, name in enumerate(GLM4_SPECIAL)}
    tokens = {"added_tokens_decoder": added, "additional_special_tokens": list(GLM4_SPECIAL)}
    tokens |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    _write_settings(folder, "THUDM/glm-4-9b-chat", "ChatGLM4Tokenizer", tokens)


def _added_token(content: str) -> dict[str, str | bool]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **flags}


def _write_settings(folder: Path, name: str, tokenizer_class: str, more: dict[str, object]) -> None:
    settings = {
        "name_or_path": name,
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": tokenizer_class,
    }
    settings["auto_map"] = {"AutoTokenizer": [f"tokenization_chatglm.{tokenizer_class}", None]}
    text = json.dumps(settings | more, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _write_glm4_0414(folder: Path, lines: Sequence[str], text_tokens: int) -> None:
    tokenizer = _train_bytes(lines, text_tokens)
    tokenizer.add_special_tokens(list(GLM4_SPECIAL))
    start = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B", special_tokens=start
    )
    stock = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=GLM4_0414_TEMPLATE,
    )
    stock.save_pretrained(folder)
