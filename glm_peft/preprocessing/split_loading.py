"""Load the splits of a run from their sources: within their limits, with rows held out, and with a word on each."""

import logging
from dataclasses import replace
from itertools import islice

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.sources import read_train_sources
from glm_peft.arguments.splits import expand_splits, file_of
from glm_peft.errors import UserError
from glm_peft.preprocessing.columns import carries_meaning, describe_unread
from glm_peft.preprocessing.conversations import Conversation, Split, open_rows, paused_collection, read_conversations
from glm_peft.preprocessing.division import choose_held_out

logger = logging.getLogger(__name__)

_FIRST_ROWS = 1000  # of a source, which are read before training where it is streamed
_SHOWN_ROWS = 5
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


def load_splits(data_args: DataArguments, splits: list[str]) -> dict[str, Split]:
    """
    Read the wanted splits from their files, or from the Hub data set where no file is given for a split.

    Args:
        data_args: the data arguments (`glm_peft.arguments.training.DataArguments`).
        splits: of `"train"`, `"validation"`, `"test"`. Rows of `test` need no answer. Where several files are given
            for evaluation, or rows of several sources are held out, each has a name of its own instead of
            `"validation"`; a source without rows for it has none.

    Raises:
        UserError: a source is missing or cannot be read, columns are not found, or (unless `skip_bad_rows`) a row
            cannot be used; the message names file, line, column and what was found.
    """
    names = expand_splits(splits, data_args)
    with paused_collection():
        if data_args.validation_split is None:
            return {name: _load(data_args, name) for name in names}
        loaded = {name: _load(data_args, name) for name in names if name == "test"}
        if len(loaded) < len(names):
            loaded |= _hold_out(_load(data_args, "train", is_limited=False), data_args)
        return {name: loaded[name] for name in names if name in loaded}


def _load(data_args: DataArguments, name: str, is_limited: bool = True) -> Split:
    """Read a split, or the sources that it is mixed of; without the limit on its rows if not `is_limited`."""
    sources = read_train_sources(data_args.train_file) if name == "train" else []
    if not sources:
        return _load_split(data_args, name, file_of(data_args, name), is_limited)
    parts = []
    for source in sources:
        own_args = replace(data_args, **source.columns) if source.columns else data_args
        part = _load_split(own_args, f"{name}_{source.name}", source.file, is_limited)
        parts.append(replace(part, weight=source.weight))
    return _join(parts)


def _join(parts: list[Split]) -> Split:
    """Return the split that has the conversations of all its parts."""
    conversations = [conversation for part in parts for conversation in part]
    return Split("train", ", ".join(part.source for part in parts), conversations, parts=tuple(parts))


def _hold_out(whole: Split, data_args: DataArguments) -> dict[str, Split]:
    """Divide the rows of training: return those to train on, and those that are held out for its evaluation."""
    wanted, seed = data_args.validation_split, data_args.rows_seed
    chosen = choose_held_out(map(_first_question, whole), wanted, seed)
    told = f"--validation_split {wanted:g}, --rows_seed {seed}"
    kept, held = [], {}
    for part in whole.parts or [whole]:
        rows = [conversation for conversation in part if _first_question(conversation) in chosen]
        level = logging.INFO if rows else logging.WARNING  # as it then has no scores of its own
        found = part.source, len(rows), len(part), told
        logger.log(level, "%s: %d of %d rows are held out for evaluation (%s).", *found)
        kept.append(_without(part, chosen, data_args.max_train_samples))
        name = part.name.replace("train", "validation", 1)
        if rows:
            held[name] = Split(name, f"{part.source} ({told})", rows[: data_args.max_eval_samples])
    return {"train": _join(kept) if whole.parts else kept[0]} | held


def _without(split: Split, held_out: set[str], limit: int | None) -> Split:
    kept = [conversation for conversation in split if _first_question(conversation) not in held_out][:limit]
    if not kept:
        raise UserError(f"{split.source}: --validation_split leaves no row of it to train on: give less.")
    return replace(split, conversations=kept)


def _first_question(conversation: Conversation) -> str:
    text = next(message["content"] for message in conversation.messages if message["role"] == "user")
    return " ".join(text.split())


def _load_split(data_args: DataArguments, name: str, file: str | None, is_limited: bool) -> Split:
    if file is None and data_args.dataset_name is None:
        raise UserError(f"There is no {name} data: give --{name}_file or --dataset_name.")
    rows = open_rows(data_args, name, file)
    split = Split(name, file or f"{data_args.dataset_name} ({name})")
    limit = getattr(data_args, _LIMITS[split.kind]) if is_limited else None
    told = f"--{_LIMITS[split.kind]} {limit}"
    if data_args.streaming and split.kind == "train" and (limit or _FIRST_ROWS) >= _FIRST_ROWS:
        limit, told = _FIRST_ROWS, f"the first {_FIRST_ROWS:,}: --streaming reads the others while it trains"
    # islice ends the reading itself at the limit: the rest of a large file is neither read nor checked.
    try:
        split.conversations = list(islice(read_conversations(rows, split, data_args), limit))
    finally:  # at a bad row, too, and only now: history and system text may begin in a later row
        if split.columns:
            logger.info("%s: %s.", split.source, split.columns.describe(split.read))
    if limit is not None and len(split) == limit:
        split.limit = told
    if not split.conversations:
        raise UserError(_nothing_left(split))
    if split.unread:
        level = logging.WARNING if carries_meaning(split.unread) else logging.INFO
        logger.log(level, "%s: %s.", split.source, describe_unread(split.unread))
    if split.unoffered:
        logger.warning(
            "%s calls a tool that its row does not offer (%d such calls in all): add the tool, or correct the name.",
            split.unoffered[0],
            len(split.unoffered),
        )
    if split.without_loss:
        logger.warning("%s.", _describe_without_loss(split))
    return split


def _nothing_left(split: Split) -> str:
    if split.without_loss:
        return f"{_describe_without_loss(split)}, and no other row is left to learn from: let some answer carry loss."
    if not split.left_out:
        return f"{split.source} holds no rows: it must hold at least one."
    return f"{split.source}: none of the {len(split.left_out)} rows can be used; the first: {split.left_out[0]}."


def _describe_without_loss(split: Split) -> str:
    number, first = len(split.without_loss), ", ".join(split.without_loss[:_SHOWN_ROWS])
    more = ", …" if number > _SHOWN_ROWS else ""
    return f"{split.source}: no answer carries loss in {number} row{'s' if number > 1 else ''} ({first}{more})"
