"""Collect the files of an adapter's folder that go to the Hub, with the base's Hub id in them and nothing private."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from glm_peft.errors import UserError
from glm_peft.hub.rights import is_hub_id
from glm_peft.provenance.ownership import find_foreign, read_results
from glm_peft.provenance.recipe import public_name, select_scores
from glm_peft.provenance.record import read_provenance
from glm_peft.publishing.card.build import build_card
from glm_peft.publishing.card.values import part, text_of
from glm_peft.reporting.file_names import (
    CARD_NAME,
    COMPARISON_NAME,
    COMPARISON_PICTURE_NAME,
    CURVES_NAME,
    PREDICT_RESULTS_NAME,
    PROVENANCE_NAME,
    RESULTS_NAME,
)
from glm_peft.reporting.files import read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# A list, as `Trainer.push_to_hub` uploads the output folder whole, `training_args.bin` with its paths included.
SENT_NAMES = (
    *(CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, CURVES_NAME, COMPARISON_PICTURE_NAME),
    *(RESULTS_NAME, PREDICT_RESULTS_NAME, COMPARISON_NAME, PROVENANCE_NAME),
)
"""Every file that may be sent, in this order; the first three always are."""

_NAMES_OF_BASE = ("base_model_name_or_path", "tokenizer_name_or_path")  # the second is of PEFT's prompt tuning
_TOKEN = re.compile(rb"\b(hf|api_org)_[A-Za-z0-9]{16,}")
_TOLD_SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_FIRST = ("predict", "eval", "train")  # the split that says most
_MOST_SCORES = 4  # in the title of a commit, which is to stay in one line


def find_base(folder: str | Path, base_model_id: str | None = None) -> str:
    """
    Return the Hub id that the adapter in a folder is to name as its base.

    Raises:
        UserError: the folder holds no adapter that can be sent, or its base is a local one and no id is given.
    """
    typed = text_of(_read_config(Path(folder)).get("base_model_name_or_path")) or ""
    recorded = text_of(part(read_provenance(str(folder)), "base").get("name"))
    # The record names folders by their last part: where the two differ, the base was a folder.
    is_folder = recorded not in (None, typed) and "/" not in recorded
    # With `./` it counts as a path, also where the folder is gone by now.
    return resolve_base_id(f"./{typed}" if is_folder else typed, base_model_id)


def resolve_base_id(base: str, base_model_id: str | None = None) -> str:
    """
    Return the Hub id of a base: the one that is given, or that of the name or path as it was typed.

    Raises:
        UserError: it is a folder and no id is given, or what is given is none.
    """
    if base_model_id is not None:
        if not is_hub_id(base_model_id):
            raise UserError(f"--base_model_id {base_model_id} is no Hub id: give one such as THUDM/chatglm3-6b.")
        return base_model_id
    name = public_name(base) if base else ""  # of an empty path it would be the name of the current folder
    if not is_hub_id(name):
        raise UserError(
            f"The base {base.removeprefix('./') or 'of the adapter'} is a folder of this machine, and on the Hub an "
            "adapter names its base by a Hub id: give --base_model_id, such as THUDM/chatglm3-6b."
        )
    return name


def collect_files(
    folder: str | Path,
    base: str,
    repo_id: str | None = None,
    language: str | None = None,
    examples: int | None = None,
) -> dict[str, bytes]:
    """
    Return the files to send, by their names in the repository.

    Args:
        folder: of an adapter, such as a run's output or a checkpoint.
        base: the Hub id of the base.
        repo_id: the repository that they go to; `None` where that is not known.
        language: of the card; `None` for the one that training was given.
        examples: the most rows of data in the card; `None` for what training was given.

    Raises:
        UserError: there is no adapter, or a file holds a path of this machine or a token.
    """
    folder = Path(folder)
    _read_config(folder)
    adapter_id = repo_id if repo_id and is_hub_id(repo_id) else None
    foreign = find_foreign(folder)  # which the card names
    own = [name for name in SENT_NAMES if name not in foreign and (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in own}
    # Built anew, as the card that training wrote knows no Hub ids of the adapter and of a base from a folder.
    files[CARD_NAME] = build_card(folder, base, language, adapter_id, examples).encode()
    for name in (CONFIG_NAME, PROVENANCE_NAME):
        if name in files:
            files[name] = _name_base(name, files[name], base)
    _check_private(files, folder)
    return {name: files[name] for name in SENT_NAMES if name in files}


def describe_sending(names: Iterable[str], repo_id: str | None, rows: int) -> str:
    """
    Return the sentence that says what a push makes public, before anything is sent.

    Args:
        names: of the files.
        rows: of data in the card.
    """
    shown = f"{rows} row{'s' if rows > 1 else ''} of data with answers (--card_examples 0 leaves them out)"
    return (
        f"To {repo_id or 'the Hub'}, for all to read unless that is private, go {', '.join(names)}: in the card stand "
        f"{shown if rows else 'no rows of data'}, and in the record the flags, the source prefix and the system text."
    )


def describe_commit(folder: str | Path, base: str, what: str = "Adapter") -> str:
    """Return the title of a commit, such as `Adapter for THUDM/chatglm3-6b: rouge-l 31.2, bleu-4 8.1 (predict)`."""
    scores = _describe_scores(Path(folder))
    return f"{what} for {base}{': ' if scores else ''}{scores}"


def _describe_scores(folder: Path) -> str:
    scores = select_scores(read_results(folder, find_foreign(folder)))
    scores = scores or _last_logged(folder)
    for split in _FIRST:
        found = {name: scores.get(f"{split}_{name}") for name in (*_TOLD_SCORES, "loss")}
        told = [f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float)]
        if told:
            return f"{', '.join(told[:_MOST_SCORES])} ({split})"
    return ""


def _last_logged(folder: Path) -> dict[str, Any]:
    """Return the last scores that the trainer logged before it saved a checkpoint."""
    # A checkpoint has no files of results: those are written when training ends.
    history = read_json(folder / "trainer_state.json").get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    logged = {"train_loss" if name == "loss" else name: entry[name] for entry in entries for name in entry}
    return select_scores(logged)


def _name_base(name: str, content: bytes, base: str) -> bytes:
    """Put the base's Hub id into PEFT's config or the record: PEFT writes a path there as it was typed."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error}): nothing was sent; copy the adapter again.") from error
    if name == CONFIG_NAME:
        value |= {field: base for field in _NAMES_OF_BASE if value.get(field)} | {_NAMES_OF_BASE[0]: base}
    elif isinstance(value, dict) and isinstance(value.get("base"), dict):
        value["base"]["name"] = base
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_private(files: dict[str, bytes], folder: Path) -> None:
    """Raise a `UserError` where a path of this machine or a token is in a file, of whatever kind."""
    places = {str(place) for place in (folder.absolute(), folder.resolve(), Path.cwd(), Path.home())}
    # Short ones such as / and /root are left out: they stand in texts that tell of no machine.
    private = {place for place in places if len(Path(place).parts) > 2} | ({get_token()} - {None})
    private |= {json.dumps(text)[1:-1] for text in private}  # as JSON escapes it
    for name, content in files.items():
        if _TOKEN.search(content) or any(text.encode() in content for text in private):
            told = "; its examples are the first rows of the predictions" if name == CARD_NAME else ""
            raise UserError(
                f"{name} holds a path of this machine or a token: nothing was sent; take it out of there{told}."
            )


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"There is no {missing[0]} in {folder}: give the folder of an adapter, such as the output folder of a "
            "run; base weights are not sent."
        )
    return read_json(folder / CONFIG_NAME)
