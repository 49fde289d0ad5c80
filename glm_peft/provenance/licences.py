"""What a base's own files say of its licence; nothing is known of it otherwise."""

import re
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import cached_file

from glm_peft.models.loading import hub_arguments

# The first is of the weights where the second is of the code.
_FILES = ("MODEL_LICENSE", "LICENSE")
_FIELDS = ("license", "license_name", "license_link")
_METADATA = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
_TITLES = (
    (re.compile(r"\A\s*Apache License\s+Version 2\.0"), "apache-2.0"),
    (re.compile(r"\A\s*(The )?MIT License"), "mit"),
)


def read_licence(model_args: Any) -> dict[str, str]:
    """
    `license`, `license_name` and `license_link` as the base's card has them, or `license_file` of its folder.

    A licence in a file is named by its first lines where they are Apache's or MIT's; another one is `other`. Empty
    where the base says nothing, or its card is on the Hub and cannot be read.

    Args:
        model_args: `model_name_or_path`, and maybe `model_revision` and `cache_dir`.
    """
    said = _METADATA.match(_read(model_args, "README.md") or "")
    try:
        metadata = yaml.safe_load(said[1]) if said else None
    except yaml.YAMLError:
        metadata = None
    found = {name: metadata.get(name) for name in _FIELDS} if isinstance(metadata, dict) else {}
    found = {name: value.strip() for name, value in found.items() if isinstance(value, str) and value.strip()}
    return found if "license" in found else _read_file(model_args)


def _read_file(model_args: Any) -> dict[str, str]:
    for name in _FILES:
        text = _read(model_args, name)
        if text:
            known = next((licence for title, licence in _TITLES if title.match(text)), None)
            return {"license": known} if known else {"license": "other", "license_file": name}
    return {}


def _read(model_args: Any, name: str) -> str | None:
    """A text file of the base, from its folder, the Hub or the cache."""
    source = model_args.model_name_or_path
    try:
        if Path(source).is_dir():
            file = Path(source) / name
            return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
        file = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments(model_args),
        )
        return Path(file).read_text(encoding="utf-8", errors="replace") if file else None
    except (OSError, ValueError):
        return None  # a licence is not worth a run
