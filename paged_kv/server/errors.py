"""Errors as clients of OpenAI's API read them: a status, and {"error": {message, type, param, code}}.

Imports errors.
"""

from typing import Any

from ..errors import (
    ArgumentError,
    DeadlineExceeded,
    EngineClosed,
    OutOfPages,
    OutOfSequences,
    PagedKVError,
    QueueFull,
    SequenceTooLong,
)

#: Seconds after which a client may try again when the queue is full.
RETRY_AFTER = "1"
#: (error, status, type, code), the first that fits.
KINDS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (SequenceTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    (OutOfPages, 400, "invalid_request_error", "context_length_exceeded"),
    (OutOfSequences, 400, "invalid_request_error", "too_many_samples"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (EngineClosed, 503, "service_unavailable_error", "shutting_down"),
    (DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (ArgumentError, 400, "invalid_request_error", None),
    (ImportError, 501, "not_implemented_error", "missing_extra"),
    (PagedKVError, 500, "server_error", None),
)
TYPES = {401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error"}


class ApiError(Exception):
    """What a route refuses.

    param : the field that is wrong
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "", param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        kind = kind or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.headers = status, {"Retry-After": RETRY_AFTER} if status in (429, 503) else {}
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong, at this field."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: Exception) -> ApiError:
    """The same as a client reads it.  Of an error that is none of ours, nothing is shown."""
    if isinstance(error, ApiError):
        return error
    for kind, status, name, code in KINDS:
        if isinstance(error, kind):
            return ApiError(status, str(error), kind=name, code=code)
    return ApiError(500, "the server has failed; its log says how", kind="server_error")
