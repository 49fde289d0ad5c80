"""Decode what was generated, without the tokens that end an answer."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from glm_peft.models.chat_format import ChatFormat, find_token_id
from glm_peft.models.tool_formats import TURN_MARK


def decode_answer(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, ids: list[int]) -> str:
    """
    Decode the generated ids of an answer, with the white space around it, without special tokens and its end.

    Where it calls tools, the mark between a thought and the calls stays.
    """
    blocks = decode_blocks(tokenizer, chat_format, ids)
    if len(blocks) > 1 and chat_format.read_turn(text := TURN_MARK.join(blocks))[1]:
        return text
    return _decode(tokenizer, chat_format, ids)


def decode_blocks(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, ids: list[int]) -> list[str]:
    """Decode the generated ids of a turn, each of the blocks that the model begins within it by itself."""
    mark = find_token_id(tokenizer, TURN_MARK) if chat_format.has_roles else None
    blocks = [list(group) for is_mark, group in groupby(ids, lambda id_: id_ == mark) if not is_mark]
    return [_decode(tokenizer, chat_format, block) for block in blocks]


def _decode(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, ids: list[int]) -> str:
    stops = chat_format.stop_token_ids(tokenizer)
    # skip_special_tokens would leave in what ends an answer without being special to the tokenizer.
    return tokenizer.decode([id_ for id_ in ids if id_ not in stops], skip_special_tokens=True)
