"""What a client is told when something is wrong: one sentence, in OpenAI's form."""

from http import HTTPStatus

from fastapi.responses import JSONResponse

_CODES = {401: "invalid_api_key", 429: "queue_full", 503: "unavailable"}


class RequestError(Exception):
    """
    A request that is not answered.

    Args:
        status: of HTTP.
        message: one sentence: what is wrong, what was found, what to do.
        param: the field of the request that it is about.
        code: a word for programs; `None` for that of the status, where it has one.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers
        self.code = code or _CODES.get(status)

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the object that says what is wrong."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = "rate_limit_error" if self.status == HTTPStatus.TOO_MANY_REQUESTS else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response that says what is wrong."""
        return JSONResponse(self.body(), self.status, self.headers)
