"""Check whether an adapter can be sent to a repository of the Hub, before anything is changed there."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.errors import LOGIN, PASSING_STATUS, explained, status_of


def check_rights(repo_id: str, flag: str = "--repo_id") -> str:
    """
    Check, without changing anything there, that files can be sent, and return the full id of the repository.

    Returns:
        `repo_id` with the user's own name before it, where it had none.

    Raises:
        Unsent: the Hub cannot be asked now.
        UserError: there is no token, it may not write there, or the repository cannot take an adapter.
    """
    check_name(repo_id, flag)
    set_up_connection()
    with explained(repo_id):
        api = HfApi()
        account = _account(api)
        repo_id = whole_id(api, repo_id, account)
        # A namespace counts for new repositories alone: a fine-grained token may be for a single one that exists.
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            _check_namespace(account, repo_id, flag)
            _check_other_kinds(api, repo_id, flag)
            return repo_id
        _check_content([file.rfilename for file in info.siblings or []], repo_id, flag)
        _check_write(api, account, repo_id, flag)
        return repo_id


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


def _account(api: HfApi) -> dict[str, Any]:
    """Return the account that the token belongs to; empty where the server does not say it, such as a mirror."""
    try:
        return api.whoami()
    except HfHubHTTPError as error:
        if status_of(error) in (401, 403) or status_of(error) in PASSING_STATUS:
            raise
        return {}


def whole_id(api: HfApi, repo_id: str, account: Mapping[str, Any] | None = None) -> str:
    """Return the id with the user's own name before it, where it has none."""
    if "/" in repo_id:
        return repo_id
    name = (api.whoami() if account is None else account).get("name")
    return f"{name}/{repo_id}"


def _check_namespace(account: Mapping[str, Any], repo_id: str, flag: str) -> None:
    """Raise a `UserError` where the token can make no repository of this name."""
    namespace = repo_id.partition("/")[0]
    _check_role(account, (namespace, repo_id), flag)
    organizations = {one.get("name"): one.get("roleInOrg") for one in account.get("orgs") or []}
    # Of an account without a name nothing is known: the request itself will show whether it may.
    if not account.get("name") or namespace == account["name"]:
        return
    if namespace not in organizations or organizations[namespace] in ("read", "no_access"):
        may = "may only read there" if namespace in organizations else "is no member of it"
        raise UserError(
            f"{flag} {repo_id} cannot be made: {namespace} is not the token's user {account['name']}, who {may}; give "
            f"{account['name']}/{repo_id.partition('/')[2]}, or {LOGIN} there."
        )


def _check_role(account: Mapping[str, Any], names: tuple[str, str], flag: str) -> None:
    token = _part(account, "auth", "accessToken")
    scopes = _part(token, "fineGrained").get("scoped") or []
    allowed = [scope for scope in scopes if "repo.write" in (scope.get("permissions") or [])]
    # A fine-grained token without a list of scopes is one whose rights the server does not tell: it is tried.
    may_write = any(_part(scope, "entity").get("name") in names for scope in allowed)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and scopes and not may_write):
        raise UserError(f"The token for the Hub may not write to {flag} {names[1]}: {LOGIN} there.")


def _part(answer: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the object under these names; empty where a server leaves it out, or says null, as for some tokens."""
    for name in names:
        answer = answer.get(name) or {}
    return answer


def _check_write(api: HfApi, account: Mapping[str, Any], repo_id: str, flag: str) -> None:
    _check_role(account, (repo_id.partition("/")[0], repo_id), flag)
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if status_of(error) in (401, 403):
            raise UserError(f"The token for the Hub may not write to {flag} {repo_id}: {LOGIN} there.") from error
        if status_of(error) in PASSING_STATUS:
            raise  # otherwise the server cannot say it


def _check_other_kinds(api: HfApi, repo_id: str, flag: str) -> None:
    for kind, word in (("dataset", "a data set"), ("space", "a Space")):
        with suppress(HfHubHTTPError):  # 404, if all is well
            api.repo_info(repo_id, repo_type=kind)
            raise UserError(f"{flag} {repo_id} is {word} on the Hub: an adapter goes to a model's; give another name.")


def _check_content(names: list[str], repo_id: str, flag: str) -> None:
    # Where there is an adapter_config.json, transformers loads the base that it names, not the weights beside it.
    weights = [name for name in names if re.fullmatch(r"(pytorch_)?model.*\.(safetensors|bin)", name)]
    if weights and "adapter_config.json" not in names:
        raise UserError(
            f"{flag} {repo_id} holds a whole model ({weights[0]}), and an adapter among its files would be taken for "
            "a part of it: give another name."
        )
