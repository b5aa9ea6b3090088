# SPDX-License-Identifier: MIT
"""Every exception the engine raises on purpose. Knows no HTTP status and no dialect.

Three verbs: the caller's mistake is a `RequestError` and always answers the client; a bad
configuration is a `ValueError` before anything is allocated; a broken invariant is a bug.
"""


class TokenSpeedError(Exception):
    """Base of all errors that TokenSpeed raises on purpose."""


class RequestError(TokenSpeedError):
    """A request cannot be served as it is asked. Never disturbs another request.

    `field` names the offending request field (None if it is the request as a whole); `code` is a
    stable machine-readable word such as `context_length_exceeded`.
    """

    def __init__(
        self, message: str, *, field: str | None = None, code: str = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class ContextLengthError(RequestError):
    """A prompt of at least `num_tokens` leaves no room for an answer in `limit`.

    The numbers are for dialects that say it in words of their own.
    """

    def __init__(self, message: str, num_tokens: int, limit: int, *, field: str) -> None:
        super().__init__(message, field=field, code="context_length_exceeded")
        self.num_tokens, self.limit = num_tokens, limit


class ModelLoadError(TokenSpeedError, ValueError):
    """A model folder or hub id cannot be loaded: missing, malformed, or not supported."""


class EngineDeadError(TokenSpeedError):
    """The engine stopped; every open request has failed and no new one is accepted."""


class RankDiedError(TokenSpeedError):
    """A rank of the engine ended or cannot be reached; the engine ends with it."""
