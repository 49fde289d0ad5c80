"""Check whether an adapter can be sent to a repository of the Hub, before anything is changed there."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.errors import LOGIN, explained


def check_rights(repo_id: str, flag: str = "--repo_id") -> str:
    """
    Check, without changing anything there, that files can be sent, and return the full id of the repository.

    Returns:
        `repo_id` with the user's own name before it, where it had none, and under its new name where it was renamed.

    Raises:
        Unsent: the Hub cannot be asked now.
        UserError: there is no token, it may not write there, or the repository cannot take an adapter.
    """
    check_name(repo_id, flag)
    set_up_connection()
    with explained(repo_id):
        api = HfApi()
        account = api.whoami()
        repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        _check_token(account, repo_id, flag)
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            # A namespace counts for new repositories alone: a token may be for a single one that exists.
            _check_namespace(account, repo_id, flag)
            return repo_id
        _check_content([file.rfilename for file in info.siblings or []], repo_id, flag)
        api.auth_check(repo_id, write=True)
        return info.id  # a repository that was renamed answers to its former name, but not to every request


def is_hub_id(name: str) -> bool:
    """Return whether a name is an id on the Hub with its owner, such as `THUDM/chatglm3-6b`, and no path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_name(repo_id: str, flag: str) -> None:
    """Raise a `UserError` where the Hub allows no repository of this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f"{flag} {repo_id} is no name that the Hub allows: give USER/NAME, of at most 96 letters, digits, and "
            "-, _ and . between them."
        ) from None


def _check_token(account: Mapping[str, Any], repo_id: str, flag: str) -> None:
    """Raise a `UserError` where the token can only read, or is for other repositories."""
    token = _part(account, "auth", "accessToken")
    scopes = _part(token, "fineGrained").get("scoped") or []
    writable = [_part(one, "entity").get("name") for one in scopes if "repo.write" in (one.get("permissions") or [])]
    # A fine-grained token without a list of scopes is one whose rights the server does not tell: it is tried.
    is_for_others = bool(scopes) and not {repo_id, repo_id.partition("/")[0]} & set(writable)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and is_for_others):
        raise UserError(f"The token for the Hub may not write to {flag} {repo_id}: {LOGIN} there.")


def _part(answer: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the object under these names; empty where a server leaves it out, or says null, as for some tokens."""
    for name in names:
        answer = answer.get(name) or {}
    return answer


def _check_namespace(account: Mapping[str, Any], repo_id: str, flag: str) -> None:
    """Raise a `UserError` where the token's user can make no repository of this name."""
    namespace, _, name = repo_id.partition("/")
    roles = {one.get("name"): one.get("roleInOrg") for one in account.get("orgs") or []}
    if namespace != account["name"] and roles.get(namespace, "no_access") in ("read", "no_access"):
        may = "may only read there" if namespace in roles else "is no member of it"
        raise UserError(
            f"{flag} {repo_id} cannot be made: {namespace} is not the token's user {account['name']}, who {may}; give "
            f"{account['name']}/{name}, or {LOGIN} there."
        )


def _check_content(names: list[str], repo_id: str, flag: str) -> None:
    # Where there is an adapter_config.json, transformers loads the base that it names, not the weights beside it.
    weights = [name for name in names if re.fullmatch(r"(pytorch_)?model.*\.(safetensors|bin)", name)]
    if weights and "adapter_config.json" not in names:
        raise UserError(
            f"{flag} {repo_id} holds a whole model ({weights[0]}), and an adapter among its files would be taken for "
            "a part of it: give another name."
        )
