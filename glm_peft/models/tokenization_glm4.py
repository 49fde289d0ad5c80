"""Tokenize for GLM-4-9B: tiktoken's ranks in transformers' Rust backend, which gives the published ids."""

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import BatchEncoding, PreTrainedTokenizerFast

from glm_peft.errors import UserError
from glm_peft.models.generations import GLM4
from glm_peft.models.tokenization_common import PublishedTokenizerMixin, check_ids, check_texts, check_tokenizer_file

# The published pattern by which text is cut before the merges (FORMATS section 4).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# In the order of their ids, the first of which follows the last rank.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
PREFIX = ("[gMASK]", "<sop>")


class ChatGLM4Tokenizer(PublishedTokenizerMixin, PreTrainedTokenizerFast):
    """
    Tokenizer of GLM-4-9B, which gives the published ids in the `tokenizers` backend.

    As in the published code, a special token written in a text becomes its id, unless `split_special_tokens=True`.
    It is saved as a `tokenizer.json` from which stock transformers gives the same ids.

    Args:
        vocab_file: path of the published `tokenizer.model`.
        tokenizer_file: path of a `tokenizer.json`, which is taken instead where there is one.
        generation: "glm4", or `None`, which stands for it.
        added_tokens_decoder: the special tokens by id, as `tokenizer_config.json` lists them.

    Raises:
        UserError: where the file is missing or broken, or the ids of special tokens do not follow those of the ranks.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    possible_generations = (GLM4,)

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        generation: str | None = None,
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        **kwargs: Any,
    ) -> None:
        name = kwargs.get("name_or_path", "")
        self._generation = self._check_generation(generation, (GLM4,), name)
        kwargs.pop("auto_map", None)
        if tokenizer_file is not None:
            self._tokenizer = read_tokenizer_json(check_tokenizer_file(tokenizer_file, "tokenizer.json", name))
        else:
            ranks = read_ranks(check_tokenizer_file(vocab_file, "tokenizer.model", name))
            self._tokenizer = build_tokenizer(ranks, added_tokens_decoder)
        defaults = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
        kwargs = {**defaults, **kwargs, "generation": GLM4}  # saved with the rest, so that stock transformers has them
        # A published folder may list them itself, under the older name; `all_special_tokens` has them either way.
        if "additional_special_tokens" not in kwargs:
            kwargs.setdefault("extra_special_tokens", list(self._tokenizer.get_added_tokens_decoder().values()))
        super().__init__(**kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`."""
        # transformers' own reading of them guesses at the kind of model.
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        if isinstance(text, list | tuple) and len(text) == 0:
            return BatchEncoding({"input_ids": [], "attention_mask": []})  # the backend fails for an empty batch
        self._check_max_length(**kwargs)
        try:
            return super()._encode_plus(text, text_pair, **kwargs)
        except (TypeError, UnicodeError):
            check_texts([item for item in ([text] if isinstance(text, str) else text) if isinstance(item, str)])
            raise
        finally:
            # The backend keeps the last call's settings, and would save, hash and pickle them.
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        check_ids(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def read_ranks(file: Path) -> dict[bytes, int]:
    """
    Read the byte strings of a tiktoken file and their ids.

    Raises:
        UserError: a line is not a base64 string and a number.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{file}, line {number}: a tiktoken file has a base64 string and a number there, but it holds "
                f"{line[:40]!r}: download it again."
            ) from error
    return ranks


def read_tokenizer_json(file: Path) -> Tokenizer:
    """
    Read the backend that a `tokenizer.json` describes.

    Raises:
        UserError: the file is cut off or something else.
    """
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file} is not a complete tokenizer.json ({error}): download or save it again.") from error


def build_tokenizer(ranks: dict[bytes, int], special_tokens: dict[int, AddedToken] | None = None) -> Tokenizer:
    """
    Build the Rust tokenizer that gives the ids of tiktoken's.

    Args:
        ranks: byte strings and their ids, in the order of the ids.
        special_tokens: special tokens by id; where none are given, the published ones follow the ranks.

    Raises:
        UserError: the special ids do not directly follow those of the ranks.
    """
    # The backend's vocabulary is of texts, so each byte is written as a letter of its own.
    letters = dict(enumerate(_letters_of_bytes()))
    names = {token: token.decode("latin-1").translate(letters) for token in ranks}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    # ignore_merges: as in tiktoken, a stretch that is a rank itself is not cut, whatever merges lead to it.
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, special_tokens)
    prefix = " ".join(PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A", pair=f"{prefix} $A $B", special_tokens=[(t, tokenizer.token_to_id(t)) for t in PREFIX]
    )
    return tokenizer


def _letters_of_bytes() -> list[str]:
    """Return the visible letter that the byte-level backend writes for each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    codes = {byte: byte for byte in visible} | {byte: 256 + index for index, byte in enumerate(hidden)}
    return [chr(codes[byte]) for byte in range(256)]


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """List every pair of byte strings that joins to a third, in the order of its rank."""
    # tiktoken joins whichever neighbours make a string of the lowest rank, so each way to cut a string is a merge.
    merges = []
    for token in ranks:
        cuts = ((token[:index], token[index:]) for index in range(1, len(token)))
        merges += [(left, right) for left, right in cuts if left in ranks and right in ranks]
    return merges


def _add_special_tokens(tokenizer: Tokenizer, special_tokens: dict[int, AddedToken] | None) -> None:
    first = tokenizer.get_vocab_size()
    tokens = {index: str(token) for index, token in sorted((special_tokens or {}).items())}
    # The backend numbers them itself, in this order from the last rank on: other ids can only be refused.
    tokens = tokens or {first + index: token for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens.values()])
    for index, token in tokens.items():
        if tokenizer.token_to_id(token) != index:
            raise UserError(
                f"tokenizer_config.json gives the special token {token} the id {index}, but tokenizer.model has "
                f"{first} ranks, so that it is {tokenizer.token_to_id(token)}: take both files from one repository."
            )
