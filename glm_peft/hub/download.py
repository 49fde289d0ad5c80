"""Download one revision of an adapter from the Hub into the cache."""

import logging
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.errors import PASSING_STATUS, Unsent, status_of
from glm_peft.hub.rights import is_hub_id
from glm_peft.hub.upload import with_retries
from glm_peft.reporting.file_names import PROVENANCE_NAME

logger = logging.getLogger(__name__)

_CONFIG_NAME, _WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
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
    place = (name_or_path, cache_dir)
    try:
        folder = Path(_fetch(place, _CONFIG_NAME, revision)).parent
        # By the commit, after which the cache names its folder: a push in between must not mix two revisions.
        _fetch(place, _WEIGHTS_NAME, folder.name)
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but of a Hub that could not be asked
        raise _unreachable(name_or_path, error.__cause__ or error) from error
    except EntryNotFoundError:
        return name_or_path
    except (Unsent, HfHubHTTPError) as error:
        raise _explain(error, name_or_path, revision) from error
    _fetch_record(place, folder.name)
    return str(folder)


def _fetch_record(place: tuple[str, str | None], commit: str) -> None:
    try:
        _fetch(place, PROVENANCE_NAME, commit)
    except LocalEntryNotFoundError:
        logger.warning(
            "%s of %s is not in the cache, and the Hub cannot be asked for it: nothing is known of the base that the "
            "adapter was trained on.",
            PROVENANCE_NAME,
            place[0],
        )
    except (EntryNotFoundError, HfHubHTTPError, Unsent):
        return  # stock PEFT writes none, and the adapter works without it


def _fetch(place: tuple[str, str | None], filename: str, revision: str | None) -> str:
    name, cache_dir = place
    return with_retries(
        _breakable(lambda: hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir)), tries=_TRIES
    )


def _breakable(act: Callable[[], str]) -> Callable[[], str]:
    """Wrap a download so that `with_retries` begins it anew where it broke off in the middle."""

    def attempt() -> str:
        try:
            return act()
        except httpx2.TransportError as error:
            raise Unsent(f"{type(error).__name__} {error}".strip()) from error
        except HfHubHTTPError as error:
            if status_of(error) not in PASSING_STATUS:
                raise
            raise Unsent(f"the Hub answered {status_of(error)}") from error
        except OSError as error:
            # Only huggingface_hub's own check of sizes raises one without a number: a full disk has one. A network
            # that asks to sign in first, for example, answers with a page of its own in the place of the file.
            if error.errno or isinstance(error, LocalEntryNotFoundError):
                raise
            raise Unsent("what came is not of the size that the Hub named") from error

    return attempt


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
    return _unreachable(name, error)


def _unreachable(name: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return UserError(
        f"--adapter_name_or_path {name} is no folder or Hub id that is in the cache, and the Hub cannot be reached "
        f"({reason}): give the output folder of a training run, or try again later."
    )
