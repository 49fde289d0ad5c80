"""Encode and decode by the published SentencePiece files, without looking for special tokens in text."""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from glm_peft.errors import UserError
from glm_peft.models.tokenization_common import check_texts

# ChatGLM-6B has a piece of its own for a line feed, a tab and each run of 2 to 80 spaces. One regular expression is
# three times as fast as the published code's 81 replacements.
PIECE_OF_BLANK = {"\n": "<n>", "\t": "<|tab|>", **{" " * count: f"<|blank_{count}|>" for count in range(2, 81)}}
BLANK_OF_PIECE = {piece: blank for blank, piece in PIECE_OF_BLANK.items()}
BLANKS = re.compile(r"\n|\t| {2,80}")
BLANK_PIECES = re.compile("|".join(map(re.escape, BLANK_OF_PIECE)))


def load_sentencepiece(file: Path) -> SentencePieceProcessor:
    """
    Load a SentencePiece model.

    Raises:
        UserError: where the file is something else.
    """
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        start = file.read_bytes()[:16]
        raise UserError(
            f"{file} is not a complete SentencePiece model ({file.stat().st_size} bytes, beginning with {start!r}): "
            "download it again."
        ) from error


class SentencePieceCodec:
    """Codec of ChatGLM2-6B's and ChatGLM3-6B's file, which encodes the text as it is."""

    # SentencePiece itself: the `tokenizers` backend is slower, and swallows bytes around invalid ones in decoding.

    offset = 0  # the id of the first piece

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self.processor = processor

    def __len__(self) -> int:
        """Return one more than the highest id."""
        return self.offset + len(self.processor)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """
        Return the ids of each text.

        Raises:
            UserError: a text holds a lone surrogate.
        """
        try:
            # A list starts a pool of threads, which costs more than the ids of a single text.
            return self.processor.encode(texts) if len(texts) > 1 else [self.processor.encode(text) for text in texts]
        except (RuntimeError, TypeError, UnicodeError):
            check_texts(texts)  # only now: looking for surrogates costs time that right texts need not pay
            raise

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; ids beyond the vocabulary give none."""
        # The embedding table is padded, so an untrained model may generate ids that the file does not have.
        return self.processor.decode([index for index in ids if index < len(self)])

    def piece_to_id(self, piece: str) -> int | None:
        """Return the id of a piece, or `None` where the file has no such piece."""
        index = self.processor.piece_to_id(piece)  # that of <unk> for a piece that it does not know
        return index if self.processor.id_to_piece(index) == piece else None

    def id_to_piece(self, index: int) -> str:
        """Return the piece of an id, or an empty text beyond the vocabulary."""
        return self.processor.id_to_piece(index) if index < len(self) else ""

    def pieces(self) -> list[str]:
        """Return all pieces in the order of their ids."""
        return self.processor.id_to_piece(list(range(len(self.processor))))

    def control_pieces(self) -> list[str]:
        """Return the pieces that no text is encoded to: the file's own special tokens."""
        return [piece for index, piece in enumerate(self.pieces()) if self.processor.is_control(index)]


class IceTextCodec(SentencePieceCodec):
    """
    Codec of ChatGLM-6B's file, where line feeds, tabs and runs of spaces become pieces of their own before encoding.

    Args:
        processor: the loaded `ice_text.model`.
        num_image_tokens: how many ids stand before the first piece; 20000 in the older revision, else 0.
    """

    def __init__(self, processor: SentencePieceProcessor, num_image_tokens: int = 0) -> None:
        super().__init__(processor)
        self.offset = num_image_tokens

    def encode(self, texts: list[str]) -> list[list[int]]:
        rows = super().encode([self._mark_blanks(text) for text in texts])
        return rows if not self.offset else [[index + self.offset for index in row] for row in rows]

    def decode(self, ids: list[int]) -> str:
        pieces = [index - self.offset for index in ids if self.offset <= index < len(self)]
        return BLANK_PIECES.sub(lambda match: BLANK_OF_PIECE[match.group()], self.processor.decode(pieces))

    def piece_to_id(self, piece: str) -> int | None:
        index = super().piece_to_id(piece)
        return None if index is None else index + self.offset

    def id_to_piece(self, index: int) -> str:
        if index < self.offset:
            return f"<image_{index}>"
        return self.processor.id_to_piece(index - self.offset) if index < len(self) else ""

    def pieces(self) -> list[str]:
        return [f"<image_{index}>" for index in range(self.offset)] + super().pieces()

    def control_pieces(self) -> list[str]:
        return [piece for index, piece in enumerate(super().pieces()) if self.processor.is_control(index)]

    @staticmethod
    def _mark_blanks(text: str) -> str:
        # Most texts have none of them, and three look-ups cost less than the regular expression.
        if "\n" in text or "\t" in text or "  " in text:
            return BLANKS.sub(lambda match: PIECE_OF_BLANK[match.group()], text)
        return text


def make_codec(file: Path, num_image_tokens: int = 0) -> SentencePieceCodec:
    """Return the codec for a published SentencePiece file, which is told by its pieces."""
    codec = IceTextCodec(load_sentencepiece(file), num_image_tokens)
    # Not by the file's name, which may be any.
    is_ice_text = codec.piece_to_id("<n>") is not None and "<sop>" in codec.control_pieces()
    return codec if is_ice_text else SentencePieceCodec(codec.processor)
