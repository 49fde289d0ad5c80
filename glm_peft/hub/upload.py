"""Send files to a repository of the Hub in one commit, and only those that are not there yet."""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.errors import Unsent, explained, status_of
from glm_peft.hub.rights import whole_id

logger = logging.getLogger(__name__)

_TRIES = 6  # with waits of 1, 2, 4, 8 and 16 seconds between them
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds
_PATIENCE = 90.0  # seconds after which no further attempt is made
_BINARY = (".safetensors", ".png")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """The branch that files are sent to, which is created if need be; without a namespace, the user's is meant."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    tags: tuple[str, ...] = ()


def send(files: Mapping[str, bytes], target: Target, title: str) -> str:
    """
    Send the files in one commit, in one attempt.

    Args:
        files: by their names in the repository.
        title: of the commit.

    Returns:
        The URL of the commit; of the last one where everything was there already.

    Raises:
        Unsent: it may work later.
        UserError: it never will, as it is.
    """
    set_up_connection()
    with explained(target.repo_id), _without_xet(), _without_bars():
        api = HfApi()
        repo_id = whole_id(api, target.repo_id)
        repo_id, head = _prepare(api, repo_id, target)
        # Compared in every attempt: where an answer was lost, the commit may have been made all the same, and
        # huggingface_hub would make a second one.
        present = _present(api, repo_id, head)
        changed = {
            name: content for name, content in files.items() if not present.get(name, set()) & _digests(content)
        }
        # Before the commit, so that a tag which is taken leaves nothing half done.
        _check_tags(api, repo_id, target, lambda commit: not changed and commit == head)
        if changed:
            head = _commit(api, repo_id, changed, (target, title, head))
        _tag(api, repo_id, target, head)
        return f"{api.endpoint}/{repo_id}/commit/{head}"


def with_retries(
    act: Callable[[], Result],
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    tries: int = _TRIES,
) -> Result:
    """
    Return what `act` returns at the first attempt that works; each wait is twice as long as the one before.

    Args:
        sleep: waits so many seconds.
        clock: tells the seconds, of which no further attempt begins after 90.
        tries: the most attempts.

    Raises:
        Unsent: of the last attempt.
    """
    begun, wait = clock(), _FIRST_WAIT
    for attempt in range(tries):
        try:
            return act()
        except Unsent as unsent:
            seconds = unsent.retry_after or wait
            if attempt == tries - 1 or clock() - begun + seconds > _PATIENCE:
                raise
            logger.info("%s; trying again in %g s", unsent, seconds)
            sleep(seconds)
            wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError("there is at least one attempt")


def _prepare(api: HfApi, repo_id: str, target: Target) -> tuple[str, str | None]:
    """Make repository and branch where they are not there; returns the repository's id, and the last commit."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        # `exist_ok` here and below: an attempt whose answer was lost may have made it.
        api.create_repo(repo_id, private=target.private, exist_ok=True)
        info = api.model_info(repo_id)
    repo_id = info.id  # a repository that was renamed answers to its former name, but not to every request
    if target.private and info.private is False:
        logger.warning("%s is there already and is public: set it to private on its page.", repo_id)
    if not target.revision or target.revision == constants.DEFAULT_REVISION:
        return repo_id, info.sha
    branches = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).branches}
    if target.revision not in branches:
        api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    return repo_id, api.model_info(repo_id, revision=target.revision).sha


def _commit(api: HfApi, repo_id: str, files: Mapping[str, bytes], where: tuple[Target, str, str | None]) -> str:
    target, title, head = where
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    for operation in operations:
        # One by one: a pool's threads would keep a process from ending.
        if operation.path_in_repo.endswith(_BINARY):
            api.preupload_lfs_files(repo_id, [operation], revision=target.revision, free_memory=False)
    # With its parent named, the Hub refuses the commit where another came between; huggingface_hub raises where the
    # parent is not hexadecimal.
    parent = head if head and re.fullmatch(r"[0-9a-f]{7,64}", head) else None
    options = {"commit_message": title, "revision": target.revision, "parent_commit": parent}
    return api.create_commit(repo_id, operations, **options).oid


def _present(api: HfApi, repo_id: str, head: str | None) -> dict[str, set[str]]:
    """Return the digests of the files in the repository, by name."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=head))
    except HfHubHTTPError as error:
        if status_of(error) != 404:
            raise
        return {}  # without a commit there is no tree
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: {file.blob_id, *([file.lfs.sha256] if file.lfs else [])} for file in files}


def _digests(content: bytes) -> set[str]:
    """Return the two digests by which the Hub may know a content: git's SHA-1, and the SHA-256 of LFS."""
    return {hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()}


def _check_tags(api: HfApi, repo_id: str, target: Target, is_in_place: Callable[[str], bool]) -> None:
    there = _tags(api, repo_id) if target.tags else {}
    taken = [tag for tag in target.tags if tag in there and not is_in_place(there[tag])]
    if taken:
        raise UserError(f"The tag {taken[0]} is at another commit of {repo_id} already: give another one to --tags.")


def _tag(api: HfApi, repo_id: str, target: Target, head: str | None) -> None:
    for tag in target.tags:
        api.create_tag(repo_id, tag=tag, revision=head, exist_ok=True)
    if target.tags and not set(target.tags) <= _tags(api, repo_id).keys():
        raise Unsent("the Hub took a tag and does not have it")  # as a network does that asks to sign in first


def _tags(api: HfApi, repo_id: str) -> dict[str, str]:
    return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}


@contextmanager
def _without_bars() -> Iterator[None]:
    """Show no progress bars, which would run through the log of a training."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


@contextmanager
def _without_xet() -> Iterator[None]:
    """Send large files by LFS inside."""
    # Mirrors of the Hub know no Xet, and with hf_xet installed a push to them fails; an adapter is small for LFS, too.
    # huggingface_hub reads the environment when it is imported: only the constant can still be changed.
    former, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = former
