"""Sort the failures of requests to the Hub: those that may work later, and those that a user must mend."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from glm_peft.errors import UserError

# 409 and 412 say that another commit came between: the next attempt starts from it. 520 to 529 are a proxy's.
PASSING_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 529}
LOGIN = "set the environment variable HF_TOKEN or run `hf auth login`, with a token that may write"
_LONGEST = 200  # characters of a reason: some servers answer with a page of HTML


class Unsent(Exception):
    """A request failed and may work later; `retry_after` is in seconds, where the Hub says it."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """
    Turn what fails inside, in requests about a repository, into an `Unsent` or a `UserError`.

    Raises:
        Unsent: it may work later.
        UserError: it never will, as it is.
    """
    try:
        yield
    except (UserError, Unsent):
        raise
    except Exception as error:  # of the network, of the server, of what a broken answer leads to
        # huggingface_hub wraps the failure of an upload in a RuntimeError, which does not tell of what kind it was.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise _explain(cause, repo_id) from error


def _explain(error: BaseException, repo_id: str) -> Exception:
    if isinstance(error, OfflineModeIsEnabled):  # which our own client raises too, where it cannot connect
        return Unsent("HF_HUB_OFFLINE is set" if is_offline_mode() else _one_line(error))
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"There is no token for the Hub: {LOGIN}.")
    if isinstance(error, httpx2.TransportError):
        is_unreachable = isinstance(error, httpx2.ConnectError)
        what = "the Hub cannot be reached" if is_unreachable else "the connection to the Hub broke"
        return Unsent(f"{what} ({_one_line(error) or type(error).__name__})")
    if isinstance(error, HfHubHTTPError) and status_of(error):
        return _explain_status(error, repo_id)
    # `create_commit` lets the Hub check the card's metadata first, and raises a plain ValueError.
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return UserError(f"The Hub refuses README.md ({_one_line(error)}): mend its first lines, and push again.")
    if isinstance(error, ValueError | KeyError | TypeError):  # such as an answer that is not JSON
        return Unsent(f"the Hub's answer makes no sense ({type(error).__name__}: {_one_line(error)})")
    return error if isinstance(error, Exception) else Unsent(_one_line(error))


def _explain_status(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = status_of(error)
    # What was just made is not seen by every server of the Hub at once, and there the answer is 404.
    if status in PASSING_STATUS or status >= 500 or status == 404:
        seconds = error.response.headers.get("Retry-After", "")  # seconds, or a date, which is not read
        return Unsent(f"the Hub answered {status}", float(seconds) if seconds.isdigit() else None)
    if status == 401:
        return UserError(f"The Hub does not accept the token: {LOGIN}.")
    if status == 403:
        return UserError(f"The token for the Hub may not write to {repo_id}: {LOGIN} there.")
    said = _one_line(error.server_message or error)
    return UserError(
        f"The Hub refuses {repo_id} ({status}: {said}): give another name, or change what is named there."
    )


def status_of(error: HfHubHTTPError) -> int:
    """Return the HTTP status of the answer; 0 where there was no answer."""
    return error.response.status_code if error.response is not None else 0


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:_LONGEST]
