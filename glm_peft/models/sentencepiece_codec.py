"""Texts to ids and back by the published SentencePiece files, knowing nothing of special tokens in text."""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from glm_peft.errors import UserError
from glm_peft.models.tokenization_common import check_texts

# ChatGLM-6B has a piece of its own for a line feed, a tab and each run of 2 to 80 spaces.
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
            f"{file} is not a whole SentencePiece model ({file.stat().st_size} bytes, beginning with {start!r}): "
            "download it again."
        ) from error


class SentencePieceCodec:
    """The file of ChatGLM2-6B and ChatGLM3-6B: what is encoded is the text itself."""

    offset = 0  # the id of the first piece

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self.processor = processor

    def __len__(self) -> int:
        """One more than the highest id."""
        return self.offset + len(self.processor)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """
        The ids of each text.

        Raises:
            UserError: for a lone surrogate.
        """
        try:
            # One text needs no pool of threads, whose start costs more than its ids.
            return self.processor.encode(texts) if len(texts) > 1 else [self.processor.encode(text) for text in texts]
        except (RuntimeError, TypeError, UnicodeError):
            check_texts(texts)
            raise

    def decode(self, ids: list[int]) -> str:
        """The text of ids; ids beyond the vocabulary, which the padded embedding table has, are no text."""
        return self.processor.decode([index for index in ids if index < len(self)])

    def piece_to_id(self, piece: str) -> int | None:
        """The id of a piece, or `None` where the file has no such piece."""
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else None

    def id_to_piece(self, index: int) -> str:
        """The piece of an id; empty beyond the vocabulary."""
        return self.processor.id_to_piece(index) if index < len(self) else ""

    def pieces(self) -> list[str]:
        """All pieces by id."""
        return self.processor.id_to_piece(list(range(len(self.processor))))

    def control_pieces(self) -> list[str]:
        """The pieces that no text gives: the file's own special tokens."""
        return [piece for index, piece in enumerate(self.pieces()) if self.processor.is_control(index)]


class IceTextCodec(SentencePieceCodec):
    """
    The file of ChatGLM-6B: line feeds, tabs and runs of spaces become pieces of their own before encoding.

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
        if "\n" in text or "\t" in text or "  " in text:  # most texts have none, and the search costs more than these
            return BLANKS.sub(lambda match: PIECE_OF_BLANK[match.group()], text)
        return text


def make_codec(file: Path, num_image_tokens: int = 0) -> SentencePieceCodec:
    """The codec for a published SentencePiece file; that of ChatGLM-6B is known by its pieces for blanks."""
    codec = IceTextCodec(load_sentencepiece(file), num_image_tokens)
    is_ice_text = codec.piece_to_id("<n>") is not None and "<sop>" in codec.control_pieces()
    return codec if is_ice_text else SentencePieceCodec(codec.processor)
