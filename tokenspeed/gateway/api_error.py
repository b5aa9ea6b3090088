# SPDX-License-Identifier: MIT
"""`ApiError`: an answer that is an error, in OpenAI's shape. Knows HTTP statuses, no requests.

Messages name fields; they never carry paths, addresses or more than a little of what was sent.
"""

import msgspec

from tokenspeed.errors import EngineDeadError, RequestError

OVERLOADED = "overloaded"  # the code where there is no room, for a while
_MAX_MESSAGE = 600
_STATUS_OF_CODE = {"model_not_found": 404, "template_limit": 400}


class ApiError(Exception):
    """Raised anywhere under a handler; the application turns it into the reply."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        """The reply's JSON, also used as the data of an error event in a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = str(self)[:_MAX_MESSAGE].encode(errors="replace").decode()
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def overloaded(message: str, code: str, retry_after_s: int) -> ApiError:
    """503 with Retry-After: the one way in which load is shed."""
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after_s)})


def of_exception(error: Exception) -> ApiError:
    """The answer to any exception; what nobody foresaw is a 500 that tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        status = _STATUS_OF_CODE.get(error.code, 400)
        return ApiError(status, str(error), param=error.field, code=error.code)
    if isinstance(error, EngineDeadError):
        return overloaded(str(error), "engine_dead", 5)
    return ApiError(500, "the server failed on this request", code="internal_error")
