# SPDX-License-Identifier: MIT
"""Reasoning as `encrypted_content`: text that a client carries along and gives back unread.

It is sealed, not secret: the same reasoning stands in the item's `content`, and a client that
drops that still brings the model its thoughts. What another server made is told by its form.
Nothing here depends on this process, so any gateway reads what any other one wrote.
"""

import base64
import binascii
import hashlib

_MARK = "tsr1."
_CHECK = 8  # bytes of SHA-256 before the text


def seal(text: str) -> str:
    """The text as one opaque word."""
    raw = text.encode(errors="replace")
    return _MARK + base64.b64encode(_digest(raw) + raw).decode()


def unseal(sealed: str) -> str | None:
    """The text; None if it was not sealed here, or is damaged."""
    if not sealed.startswith(_MARK):
        return None
    try:
        raw = base64.b64decode(sealed[len(_MARK) :], validate=True)
        text = raw[_CHECK:].decode()
    except (binascii.Error, ValueError):
        return None
    return text if raw[:_CHECK] == _digest(raw[_CHECK:]) else None


def _digest(raw: bytes) -> bytes:
    return hashlib.sha256(_MARK.encode() + raw).digest()[:_CHECK]
