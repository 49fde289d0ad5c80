"""
Tokenize for ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B: one published class name, two kinds of SentencePiece file.

Written from the published files and the ids that they give; the specification is in the files' own pieces.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM, CHATGLM2, CHATGLM3
from glm_peft.models.sentencepiece_codec import IceTextCodec, make_codec
from glm_peft.models.tokenization_common import PublishedTokenizerMixin, check_ids, check_tokenizer_file

CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ICE_TEXT_FILE = "ice_text.model"
# Stock transformers takes a `tokenizer.model` beside `model_type: "glm"` for another kind of tokenizer and reads wrong
# ids out of it without a word. Under this name it finds no file, and says so.
SAVED_FILE = "chatglm_sentencepiece.model"
OLD_VOCAB_SIZE = 150528  # of the ChatGLM-6B revision with 20000 ids for images before those of text
OLD_NUM_IMAGE_TOKENS = 20000
LISTS_OF_SPECIAL_TOKENS = ("extra_special_tokens", "additional_special_tokens")  # the new name and the old one
# Asked for one of these, a call takes transformers' own path, which is several times slower.
RARE_RETURNS = (
    "return_token_type_ids",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_length",
    "is_split_into_words",
)


class ChatGLMTokenizer(PublishedTokenizerMixin, PreTrainedTokenizer):
    """
    Tokenizer of the first three generations, told apart by the file's pieces and the name that the files record.

    Special tokens are never looked for in text: a text that holds "[gMASK]" or "sop" is text.

    Args:
        vocab_file: path of a `tokenizer.model` (ChatGLM2, ChatGLM3) or `ice_text.model` (ChatGLM-6B).
        ice_text_file: path of an `ice_text.model`, as `from_pretrained` finds it.
        saved_file: path of a file that `save_pretrained` wrote.
        generation: "chatglm", "chatglm2" or "chatglm3"; ChatGLM3 has four role tokens more than ChatGLM2.
        num_image_tokens: how many ids stand before those of text (ChatGLM-6B only; the older revision has 20000).

    Raises:
        UserError: where the file is missing or broken, or is not of this generation.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "ice_text_file": ICE_TEXT_FILE, "saved_file": SAVED_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    possible_generations = (CHATGLM, CHATGLM2, CHATGLM3)

    def __init__(
        self,
        vocab_file: str | None = None,
        ice_text_file: str | None = None,
        saved_file: str | None = None,
        generation: str | None = None,
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        name = kwargs.get("name_or_path", "")
        files = f"tokenizer.model (of ChatGLM-6B: {ICE_TEXT_FILE})"
        file = check_tokenizer_file(saved_file or ice_text_file or vocab_file, files, name)
        self.codec = make_codec(file, num_image_tokens)
        # Dropped: the reference to remote code, and what the SentencePiece file itself says.
        for published in ("auto_map", "added_tokens_decoder", "tokenizer_file"):
            kwargs.pop(published, None)
        listed = [str(t) for key in LISTS_OF_SPECIAL_TOKENS for t in kwargs.pop(key, None) or ()]
        self._generation = self._find_generation(generation, listed, name)
        self._special_ids = self._number_special_tokens()
        self._added_tokens_decoder = {}
        kwargs = {**self._named_special_tokens(), **kwargs, "extra_special_tokens": [*self._special_ids, *listed]}
        # Given to transformers, both are saved in tokenizer_config.json and read from it again.
        if self._generation is not None:
            kwargs["generation"] = self._generation
        if isinstance(self.codec, IceTextCodec):
            kwargs["num_image_tokens"] = num_image_tokens
        super().__init__(**kwargs)

    @classmethod
    def _settings_beside(cls, tokenizer_config: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        if "num_image_tokens" in tokenizer_config or config.get("vocab_size") != OLD_VOCAB_SIZE:
            return {}
        return {"num_image_tokens": OLD_NUM_IMAGE_TOKENS}

    def _find_generation(self, generation: str | None, listed: list[str], name: str) -> str | None:
        if isinstance(self.codec, IceTextCodec):
            return self._check_generation(generation, (CHATGLM,), name)
        if generation is None and not set(ROLE_TOKENS).isdisjoint(listed):
            return CHATGLM3  # a later revision of its files lists the role tokens
        return self._check_generation(generation, (CHATGLM2, CHATGLM3), name)

    def _number_special_tokens(self) -> dict[str, int]:
        # ChatGLM-6B's file has its special tokens as pieces; those of ChatGLM2 and ChatGLM3 follow the last piece.
        if isinstance(self.codec, IceTextCodec):
            return {piece: self.codec.piece_to_id(piece) for piece in self.codec.control_pieces()}
        tokens = CONTROL_TOKENS + (ROLE_TOKENS if self._generation == CHATGLM3 else ())
        return {token: len(self.codec) + index for index, token in enumerate(tokens)}

    def _named_special_tokens(self) -> dict[str, str]:
        tokens = {"unk_token": "<unk>", "mask_token": "[MASK]"}
        if isinstance(self.codec, IceTextCodec):
            return {**tokens, "bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>"}
        return {**tokens, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}  # padding has id 0 there

    # The vocabulary

    @property
    def vocab_size(self) -> int:
        """Return how many ids the tokenizer has, special tokens counted; the model's table may have more rows."""
        return max(len(self.codec), 1 + max(self._special_ids.values()))

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return every token with its id."""
        return {piece: index for index, piece in enumerate(self.codec.pieces())} | self._special_ids

    def _convert_token_to_id(self, token: str) -> int | None:
        index = self._special_ids.get(token)
        if index is None:
            index = self.codec.piece_to_id(token)
        return self.codec.piece_to_id(self.unk_token) if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        check_ids([index])
        return self.codec.id_to_piece(index)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """Give tokens of the vocabulary a special meaning; refuse any other token."""
        # Checked before anything changes: a new id would have no row in the model's table.
        for tokens in special_tokens_dict.values():
            self._check_tokens(tokens if isinstance(tokens, list | tuple) else [tokens])
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        self._check_tokens(new_tokens)
        for token in map(str, new_tokens) if special_tokens else ():
            index = self._convert_token_to_id(token)
            self._added_tokens_decoder[index] = AddedToken(token, normalized=False, special=True)
            self._added_tokens_encoder[token] = index
        return 0

    def _check_tokens(self, tokens: Sequence[str | AddedToken]) -> None:
        for token in map(str, tokens):
            if token not in self._special_ids and self.codec.piece_to_id(token) is None:
                raise UserError(
                    f"The token {token!r} is not in the vocabulary of {self.name_or_path!r}, which is fixed: take one "
                    f"of its own special tokens ({', '.join(self._special_ids)})."
                )

    # Texts to ids

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Cut a text into pieces, without special tokens and without looking for any."""
        # transformers would look for them first, and find ChatGLM2's "eop" in "people".
        return [self.codec.id_to_piece(index) for index in self.codec.encode([text])[0]]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add the two special tokens: behind the ids in ChatGLM-6B, before them in ChatGLM2 and ChatGLM3."""
        before, after = self._frame()
        return [*before, *token_ids_0, *(token_ids_1 or []), *after]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark every special token with 1 and every token of text with 0."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        before, after = self._frame()
        return [1] * len(before) + [0] * (len(token_ids_0) + len(token_ids_1 or [])) + [1] * len(after)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the special ids before a text and those behind it."""
        if isinstance(self.codec, IceTextCodec):
            return [], [self._special_ids["[gMASK]"], self._special_ids["<sop>"]]
        return [self._special_ids["[gMASK]"], self._special_ids["sop"]], []

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        if kwargs.get("return_offsets_mapping"):
            raise UserError("This tokenizer cannot give an offset mapping: leave out return_offsets_mapping.")
        self._check_max_length(**kwargs)
        texts = [text] if isinstance(text, str) else text
        if text_pair is None and self._are_plain_texts(texts, kwargs):
            return self._encode_texts(texts, is_batched=texts is text, **kwargs)
        return super()._encode_plus(text, text_pair, **kwargs)

    @staticmethod
    def _are_plain_texts(texts: Any, kwargs: dict[str, Any]) -> bool:
        cuts = (TruncationStrategy.DO_NOT_TRUNCATE, TruncationStrategy.LONGEST_FIRST, TruncationStrategy.ONLY_FIRST)
        return (
            isinstance(texts, list | tuple)
            and all(isinstance(text, str) for text in texts)
            and kwargs.get("truncation_strategy", cuts[0]) in cuts
            and not any(kwargs.get(name) for name in RARE_RETURNS)
        )

    def _encode_texts(
        self,
        texts: list[str],
        is_batched: bool,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encode texts without transformers' detour over pieces, which takes several times as long."""
        before, after = self._frame() if add_special_tokens else ([], [])
        rows = self.codec.encode(list(texts))
        if truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE and max_length is not None:
            # Before the special tokens are added, which the model cannot do without.
            rows = [self._truncate(row, max_length - len(before) - len(after)) for row in rows]
        if before or after:
            rows = [before + row + after for row in rows]
        for row in rows:
            self._eventual_warn_about_too_long_sequence(row, max_length, verbose)
        batch = {"input_ids": rows if is_batched else rows[0]}
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            batch = self.pad(
                batch,
                padding=padding_strategy,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_attention_mask=return_attention_mask,
            ).data
        elif return_attention_mask is not False:
            batch["attention_mask"] = [[1] * len(row) for row in rows] if is_batched else [1] * len(rows[0])
        return BatchEncoding(batch, tensor_type=return_tensors, prepend_batch_axis=not is_batched)

    def _truncate(self, ids: list[int], length: int) -> list[int]:
        if len(ids) <= length:
            return ids
        # Not ids[-length:], which is everything where the length is 0.
        return ids[:length] if self.truncation_side == "right" else ids[len(ids) - length :]

    # Ids to texts

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to a text."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        check_ids(ids)
        special_ids = set(self.all_special_ids)
        if special_ids.isdisjoint(ids):
            return self.codec.decode(ids)
        # Each stretch between special tokens was encoded by itself, with a leading blank of its own to take off.
        stretches = groupby(ids, key=special_ids.__contains__)
        texts = [self._text_of(list(run), is_special, skip_special_tokens) for is_special, run in stretches]
        return "".join(texts)

    def _text_of(self, ids: list[int], is_special: bool, skip_special_tokens: bool) -> str:
        if not is_special:
            return self.codec.decode(ids)
        return "" if skip_special_tokens else "".join(self.convert_ids_to_tokens(ids))

    # Files

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the published SentencePiece file, byte for byte, under a name that only this tokenizer reads."""
        name = ICE_TEXT_FILE if isinstance(self.codec, IceTextCodec) else SAVED_FILE
        file = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        file.write_bytes(self.codec.processor.serialized_model_proto())
        return (str(file),)
