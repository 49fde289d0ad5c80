"""What of an adapter's folder goes to the Hub: a named list of files, without paths, names of users, or tokens."""

import getpass
import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from glm_peft.errors import UserError
from glm_peft.prediction.prediction_files import RESULTS_NAME as PREDICT_RESULTS_NAME
from glm_peft.provenance.recipe import public_name, select_scores
from glm_peft.publishing.card.build import build_card
from glm_peft.publishing.card.values import read_json
from glm_peft.reporting.file_names import CURVES_NAME, PROVENANCE_NAME, RESULTS_NAME

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "adapter_config.json", "adapter_model.safetensors", "README.md"
SENT_NAMES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, CURVES_NAME, RESULTS_NAME, PREDICT_RESULTS_NAME, PROVENANCE_NAME)
"""Every file that may be sent, in this order; the first three always are."""

_WEB_OR_PATH = re.compile(
    r"(?P<web>\b(?!file:)[a-z][a-z0-9+.-]*://[^\s)>\"'`\]]*)"
    r"|(?P<path>(?<![\w/.\\])(?:file:(?://)?|~|[A-Za-z]:)?(?:[/\\]+[^\s/\\\"'`<>|,;:()\[\]{}*]+){2,}[/\\]*)"
)
_WHOLE_PATH = re.compile(r"(file://|~|[A-Za-z]:)?[/\\]+[^/\\\n]+[/\\][^\n]*")
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}\b")
_COMMON = {
    "root",
    "user",
    "admin",
    "home",
    "ubuntu",
    "runner",
    "localhost",
    "host",
    "node",
    "server",
    "docker",
    "work",
}
_COMMON |= {"work", "model", "adapter", "train", "data", "test", "main", "python"}
_SHORTEST_NAME = 4
_HIDDEN = "***"
_TOLD_SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_FIRST = ("predict", "eval", "train")  # the split that says most
_MOST_SCORES = 4


def find_base(folder: str | Path, base_model_id: str | None = None, flag: str = "--base_model_id") -> str:
    """
    The Hub id that the adapter in a folder is to name as its base.

    Raises:
        UserError: the folder holds no adapter that can be sent, or its base is a local one and no id is given.
    """
    config = _read_config(Path(folder))
    recorded = str(config.get("base_model_name_or_path") or "")
    name = read_json(Path(folder) / PROVENANCE_NAME).get("base")
    name = name.get("name") if isinstance(name, dict) else None
    # The record names folders by their last part: where the two differ, the base was a folder.
    is_folder = name not in (None, recorded) and "/" not in str(name)
    return settle_base_id("./" + recorded if is_folder else recorded, base_model_id, flag)


def settle_base_id(base: str, base_model_id: str | None = None, flag: str = "--base_model_id") -> str:
    """
    The Hub id of a base, which is a name or path as it was typed.

    Raises:
        UserError: it is a folder and no id is given, or what is given is none.
    """
    if base_model_id is not None:
        if Path(base_model_id).is_absolute() or not _is_hub_id(base_model_id):
            raise UserError(f"{flag} {base_model_id} is no Hub id: give one such as THUDM/chatglm3-6b.")
        return base_model_id
    name = public_name(base)
    is_cached = name != base and "/" in name
    if is_cached or (base and name == base and "/" in name and _is_hub_id(base)):
        return name
    raise UserError(
        f"The base {base.removeprefix('./') or 'of the adapter'} is a folder of this machine, and on the Hub an "
        f"adapter names its base by a Hub id: give {flag}, such as THUDM/chatglm3-6b."
    )


def collect_files(
    folder: str | Path, base: str, repo_id: str | None = None, language: str | None = None
) -> dict[str, bytes]:
    """
    The files to send, by their names in the repository.

    Args:
        folder: of an adapter, such as a run's output or a checkpoint.
        base: the Hub id of its base.
        repo_id: where they go; `None` where that is not known.
        language: of the card; `None` for that of the training.

    Raises:
        UserError: there is no adapter, or something private is in a file that is sent as it is.
    """
    folder = Path(folder)
    _read_config(folder)
    cleaner = Cleaner(folder, (base, repo_id or ""))
    files = {}
    for name in SENT_NAMES:
        if name == CARD_NAME:
            files[name] = cleaner.clean_text(_build_card(folder, (base, repo_id), language)).encode()
        elif (folder / name).is_file():
            content = (folder / name).read_bytes()
            files[name] = _clean_json(name, content, base, cleaner) if name.endswith(".json") else content
    for name, content in files.items():
        cleaner.check(name, content)
    return files


class Cleaner:
    """
    Takes out of texts what is nobody's business.

    Args:
        folder: whose path is one of these things.
        public: texts whose words are no secret, such as ids on the Hub.
    """

    def __init__(self, folder: Path, public: tuple[str, ...] = ()) -> None:
        places = {str(place) for place in (folder.absolute(), folder.resolve(), Path.cwd(), Path.home())}
        self.places = sorted((place for place in places if len(place) > 1), key=len, reverse=True)
        known = {word for text in public for word in re.split(r"[/\s]", text)} | _COMMON
        self.names = [name for name in _own_names() if len(name) >= _SHORTEST_NAME and name not in known]
        self.token = get_token()

    def clean_text(self, text: str) -> str:
        """Paths become their last part; tokens, and the names of user and machine, asterisks."""
        if self.token:
            text = text.replace(self.token, _HIDDEN)
        text = _TOKEN.sub(_HIDDEN, text)
        text = _WEB_OR_PATH.sub(lambda found: found["web"] or _last_part(found["path"]), text)
        for place in self.places:
            text = re.sub(rf"(?<![\w./]){re.escape(place)}(?![\w-])", _last_part(place), text)
        for name in self.names:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", _HIDDEN, text)
        return text

    def clean_value(self, value: Any) -> Any:
        """The same in every text of a JSON value; a text that is a path from end to end may have blanks in it."""
        if isinstance(value, dict):
            return {self.clean_text(name): self.clean_value(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.clean_value(item) for item in value]
        if not isinstance(value, str):
            return value
        return self.clean_text(_last_part(value) if _WHOLE_PATH.fullmatch(value) else value)

    def check(self, name: str, content: bytes) -> None:
        """Raise a `UserError` where a place of this machine or a token is left, in whatever kind of file."""
        private = [place for place in self.places if place.count("/") > 1] + [self.token or ""]
        if any(text and text.encode() in content for text in private):
            raise UserError(f"{name} holds a path of this machine or a token: nothing was sent; take it out of there.")


def describe_commit(folder: str | Path, base: str, what: str = "Adapter") -> str:
    """The title of a commit, such as `Adapter for THUDM/chatglm3-6b: rouge-l 31.2, bleu-4 8.1 (predict)`."""
    scores = _describe_scores(Path(folder))
    return f"{what} for {base}{': ' if scores else ''}{scores}"


def _describe_scores(folder: Path) -> str:
    scores = select_scores(read_json(folder / RESULTS_NAME) | read_json(folder / PREDICT_RESULTS_NAME))
    scores = scores or _last_logged(folder)
    for split in _FIRST:
        found = {name: scores.get(f"{split}_{name}") for name in (*_TOLD_SCORES, "loss")}
        told = [f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float)]
        if told:
            return f"{', '.join(told[:_MOST_SCORES])} ({split})"
    return ""


def _last_logged(folder: Path) -> dict[str, Any]:
    """The last scores of a checkpoint, by the trainer's record."""
    history = read_json(folder / "trainer_state.json").get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    logged = {"train_loss" if name == "loss" else name: entry[name] for entry in entries for name in entry}
    return select_scores(logged)


def _build_card(folder: Path, ids: tuple[str, str | None], language: str | None) -> str:
    base, repo_id = ids
    whole_id = repo_id if repo_id and "/" in repo_id else None
    card = ModelCard(build_card(folder, base, language, whole_id), ignore_metadata_errors=True)
    if card.data.base_model != base:
        card.data.base_model, card.data.library_name = base, "peft"
    return str(card)


def _clean_json(name: str, content: bytes, base: str, cleaner: Cleaner) -> bytes:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error}): nothing was sent; copy the adapter again.") from error
    if name == CONFIG_NAME:
        value["base_model_name_or_path"] = base
    if name == PROVENANCE_NAME and isinstance(value.get("base"), dict):
        value["base"]["name"] = base
    return (json.dumps(cleaner.clean_value(value), indent=2, ensure_ascii=False) + "\n").encode()


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"There is no {missing[0]} in {folder}: give the folder of an adapter, such as the output folder of a "
            "run; base weights are not sent."
        )
    return read_json(folder / CONFIG_NAME)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _last_part(path: str) -> str:
    return PurePath(path.removeprefix("file://").replace("\\", "/").rstrip("/")).name


def _own_names() -> set[str]:
    names = {Path.home().name, socket.gethostname(), os.environ.get("USER", "")}
    with suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    return names
