# SPDX-License-Identifier: MIT
"""Errors in Anthropic's shape. Knows statuses, no requests.

A request for which there is no room is answered 529, as Anthropic answers it. A server that takes
none at all, because it loads or ends, says 503, as in every dialect. SDKs retry both alike.
"""

import re
import secrets

from tokenspeed.errors import ContextLengthError
from tokenspeed.gateway.api_error import OVERLOADED, ApiError
from tokenspeed.gateway.app import encode_json

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_MAX_MESSAGE = 600
_MISSING = re.compile(r"body: Object missing required field `(\w+)`")
_INDEX = re.compile(r"\[([0-9]+|\.\.\.)\]")


def failure(error: ApiError) -> bytes:
    """The JSON of an error, as a reply or as the data of an event. The id is in a header, too."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    text = _MISSING.sub(r"\1: field required", str(error))
    if error.param is not None and text.startswith(error.param):
        at = _INDEX.sub(r".\1", error.param)
        text = at + text[len(error.param) :]
    message = text[:_MAX_MESSAGE].encode(errors="replace").decode()
    request_id = error.headers.setdefault("request-id", f"req_{secrets.token_hex(12)}")
    about = {"type": kind, "message": message}
    return encode_json({"type": "error", "error": about, "request_id": request_id})


def busy(error: ApiError) -> ApiError:
    """With Anthropic's own status, if there is no room; else as it is."""
    if error.code == OVERLOADED:
        error.status = 529
    return error


def too_long(error: ContextLengthError) -> ApiError:
    """In the words by which clients know that they must compact the conversation."""
    why = f"prompt is too long: {error.num_tokens} tokens > {error.limit} maximum"
    return ApiError(400, why, param=error.field, code=error.code)
