# SPDX-License-Identifier: MIT
"""The cache receipt of a turn: what was found, what could have been, and where that ended.

Knows no dialect: each shows the same object in its usage to who asks for it.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenspeed.engine.messages import CacheReceipt
from tokenspeed.text.prompt import Prompt, Prompts
from tokenspeed.text.tokenizer import Tokenizer

HEADER = b"x-tokenspeed-receipt"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the session had of this prompt before, known before the engine is asked.

    `first_divergent_token`: its index in the prompt, in `region`; None if the last turn is
    continued, or not known.
    """

    expected: int
    first_divergent_token: int | None = None
    region: str | None = None


def wants_receipt(headers: Iterable[tuple[bytes, bytes]], field: bool | None = None) -> bool:
    """Whether a request asks for one: by the body's `cache_receipt`, or by a header."""
    if field is not None:
        return field
    return any(name == HEADER and value.strip() == b"1" for name, value in headers)


def expectation(prompts: Prompts, prompt: Prompt, tokenizer: Tokenizer) -> Expectation:
    """Costs a comparison of ids and, if they part, decoding: not for the event loop."""
    expected, differs = prompts.expected(prompt)
    if differs is None:
        return Expectation(expected)
    return Expectation(expected, differs, prompt.region_of(differs, tokenizer))


def cache_receipt(
    before: Expectation, num_cached: int, found: CacheReceipt | None
) -> dict[str, Any]:
    """`found` is the engine's word, if it gave one; `kept_until` is in seconds of the epoch."""
    found = found or CacheReceipt()
    kept = found.kept_until_s
    return {
        "matched": num_cached,
        "by_tier": {"device": num_cached - found.num_host, "host": found.num_host},
        "expected": before.expected,
        "first_divergent_token": before.first_divergent_token,
        "region": before.region,
        "reason": found.reason or None,
        "kept_until": int(time.time() + kept) if kept > 0 else None,
    }
