"""Download one revision of an adapter from the Hub into the cache."""

from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.errors import PASSING_STATUS, Unsent, status_of
from glm_peft.hub.rights import is_hub_id
from glm_peft.hub.upload import with_retries
from glm_peft.reporting.file_names import PROVENANCE_NAME

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_TRIES = 4


def fetch_adapter(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """
    Return the folder of an adapter: a given folder, or the one in the cache that a Hub id was downloaded to.

    All files are of one commit. Where the Hub cannot be reached, or the connection breaks, they come from the cache.
    The id of a repository without an adapter in safetensors is returned unchanged.

    Args:
        revision: branch, tag or commit on the Hub; `None` for main.
        cache_dir: of downloads; `None` for the Hub's usual cache.

    Raises:
        UserError: it cannot be seen or reached, there is no such revision, or a revision of a folder is asked for.
    """
    if Path(name_or_path).exists() or not is_hub_id(name_or_path):
        if revision:
            raise UserError(
                f"--adapter_revision {revision} is for a Hub id, and {name_or_path} is none: leave it out."
            )
        return name_or_path
    set_up_connection()
    try:
        folder = with_retries(lambda: _download(name_or_path, revision, cache_dir), tries=_TRIES)
    except (Unsent, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _explain(error, name_or_path, revision) from error
    return folder if all((Path(folder) / name).is_file() for name in _ADAPTER) else name_or_path


def _download(name: str, revision: str | None, cache_dir: str | None) -> str:
    """Return the folder of the files in the cache; an `Unsent` says that the same may work later."""
    files = [*_ADAPTER, PROVENANCE_NAME]  # of which stock PEFT writes no record, and works without it
    try:
        return snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=files, max_workers=1)
    except httpx2.TransportError as error:
        raise Unsent(f"{type(error).__name__} {error}".strip()) from error
    except HfHubHTTPError as error:
        if status_of(error) not in PASSING_STATUS:
            raise
        raise Unsent(f"the Hub answered {status_of(error)}") from error
    except LocalEntryNotFoundError as error:
        if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise
        raise Unsent(str(error.__cause__)) from error
    except (OSError, ValueError) as error:
        # Only huggingface_hub's own check of sizes raises an OSError without a number: a full disk has one. A network
        # that asks to sign in first, for example, answers with a page of its own in the place of the file.
        if getattr(error, "errno", None):
            raise
        raise Unsent("what came is not what the Hub has") from error


def _explain(error: Exception, name: str, revision: str | None) -> UserError:
    if isinstance(error, GatedRepoError):
        return UserError(f"The adapter {name} is gated: ask for access on its page, and set HF_TOKEN to your token.")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"--adapter_revision {revision} is no branch, tag or commit of {name}: give one of its own.")
    # The Hub answers 401 or 404 for a private repository too, so as not to tell that it exists.
    if isinstance(error, HfHubHTTPError) and status_of(error) in (401, 403, 404):
        return UserError(
            f"--adapter_name_or_path {name} is no folder or Hub id that can be seen ({status_of(error)}): look at the "
            "name, or set HF_TOKEN to a token that may read it."
        )
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    reason = " ".join(str(cause or error).split())[:200].rstrip(".")
    return UserError(
        f"--adapter_name_or_path {name} is no folder or Hub id that is in the cache, and the Hub cannot be reached "
        f"({reason}): give the output folder of a training run, or try again later."
    )
