"""Send files to a repository of the Hub in one commit, and only those that are not there yet."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import disable_progress_bars

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.errors import Unsent, explained

logger = logging.getLogger(__name__)

_TRIES = 6  # with waits of 1, 2, 4, 8 and 16 seconds between them
_LONGEST_WAIT = 60.0  # seconds, where the Hub itself says how long

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
    # Mirrors of the Hub know no Xet, and with hf_xet installed a push to them fails; an adapter is small for LFS, too.
    # huggingface_hub reads the environment when it is imported: only the constant can still be changed.
    constants.HF_HUB_DISABLE_XET = True
    disable_progress_bars()  # which would run through the log of a training
    with explained(target.repo_id):
        api = HfApi()
        # `exist_ok` here and below: an attempt whose answer was lost may have made it.
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        if target.private and api.model_info(repo_id).private is False:
            logger.warning("%s is there already and is public: set it to private on its page.", repo_id)
        if target.revision:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
        # It leaves out what is there already, and makes no commit where nothing is left: so no attempt doubles one.
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=title, revision=target.revision)
        _tag(api, repo_id, target.tags, commit.oid)
        return commit.commit_url


def with_retries(
    act: Callable[[], Result], sleep: Callable[[float], object] = time.sleep, tries: int = _TRIES
) -> Result:
    """
    Return what `act` returns at the first attempt that works; each wait is twice as long as the one before.

    Args:
        sleep: waits so many seconds.
        tries: the most attempts.

    Raises:
        Unsent: of the last attempt, or the Hub asks for a wait of more than a minute.
    """
    for attempt in range(tries - 1):
        try:
            return act()
        except Unsent as unsent:
            seconds = unsent.retry_after or 2.0**attempt
            if seconds > _LONGEST_WAIT:
                raise
            logger.info("%s; trying again in %g s", unsent, seconds)
        sleep(seconds)
    return act()


def _tag(api: HfApi, repo_id: str, tags: tuple[str, ...], commit: str) -> None:
    for tag in tags:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
    # `exist_ok` leaves a tag where it is, and a network that asks to sign in first answers in the place of the Hub.
    there = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags} if tags else {}
    for tag in tags:
        if tag not in there:
            raise Unsent("the Hub took a tag and does not have it")
        if there[tag] != commit:
            raise UserError(
                f"The tag {tag} is at another commit of {repo_id} already, and the files are sent without it: give "
                "another one to --tags."
            )
