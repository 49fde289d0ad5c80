"""Give huggingface_hub an HTTP client with a time limit, that falls back to the cache where a connection breaks."""

import functools
import logging
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils._http import hf_request_event_hook

logger = logging.getLogger(__name__)

# huggingface_hub's own client has no limit: most of its requests wait without end.
_TIMEOUT = 30.0  # seconds without a byte


@functools.cache
def set_up_connection() -> None:
    """Make huggingface_hub send the requests of this process through the client of this module."""
    set_client_factory(_make_client)


class _Client(httpx2.Client):
    def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        """Send a request; where it only asks for something, raise what makes huggingface_hub turn to its cache."""
        only_asks = request.method == "HEAD" or (request.method == "GET" and request.url.path.startswith("/api/"))
        try:
            return super().send(request, **kwargs)
        except httpx2.ConnectError as error:
            if not only_asks:
                raise
            # A ConnectError is tried again for half a minute, for every file that a repository may have or not.
            raise OfflineModeIsEnabled(f"{request.url.host} cannot be reached: {error}") from error
        except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError) as error:
            if not only_asks:
                raise
            # huggingface_hub turns to its cache where it cannot connect, but not where the connection breaks later.
            host = request.url.host
            logger.warning("The connection to %s broke: using what is in the cache, if it is there.", host)
            raise httpx2.ConnectError(str(error), request=request) from error


def _make_client() -> _Client:
    # As huggingface_hub's own but for the time limit; the hook is what heeds HF_HUB_OFFLINE.
    return _Client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=_TIMEOUT)
