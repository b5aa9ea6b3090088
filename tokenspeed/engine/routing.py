# SPDX-License-Identifier: MIT
"""Which of several targets serves a request: the longest known prefix, unless load says otherwise.

Targets are whole engines behind one gateway, or the schedulers of one engine. Knows ids and counts;
no process, no clock. The rule (`pick`) is apart from the record of who was given what
(`PrefixRouter`), because a caller that holds exact caches needs the rule alone.

What a target is worth to a request, in tokens:

    score = matched prompt tokens - waiting prompt tokens / 8 - 1024 * open requests

The first term is prefill that this target saves, the others the work that it has more of than the
next one: only differences count. Work that waits weighs less than work that is saved, because it
is over soon, while a session that moves has its prefix computed again, and held twice: that delays
everybody. So a session's prefix of 100,000 tokens outweighs a hundred open requests, and a system
prompt of 12,000, which many sessions share, a dozen. The two numbers are chosen by the
simulation of `benchmarks/routing.py`, where those near them do as well and others worse.
"""

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

WAITING_PER_SAVED = 8  # waiting tokens that outweigh a matched one
REQUEST_TOKENS = 1024  # matched tokens that outweigh an open request
MIN_BLOCK = 256  # tokens in a block of the record at least; smaller ones cost more than they find

Prompt = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Load:
    """What a target has to do already."""

    waiting_tokens: int = 0  # prompt tokens that it was given, no cache holds, and no step has done
    num_requests: int = 0  # that are open there: waiting or running

    @property
    def cost(self) -> int:
        """In matched tokens."""
        return self.waiting_tokens // WAITING_PER_SAVED + REQUEST_TOKENS * self.num_requests


def pick(matched: Sequence[int], loads: Sequence[Load | None], last: int = -1) -> int | None:
    """The target to use, by the rule above; None if there is none.

    `matched`: prompt tokens that each target holds. A load of None: this target cannot take the
    request. Equal scores go to the least load, equal loads to the first after `last`.
    """
    able = []
    for step in range(len(loads)):
        target = (last + 1 + step) % len(loads)
        if (load := loads[target]) is not None:
            able.append((matched[target] - load.cost, -load.cost, -step, target))
    return max(able)[-1] if able else None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes, and why."""

    target: int
    matched: int  # prompt tokens that the target is believed to hold
    by_load: bool  # another target, not full, held more
    blocks: list[bytes]  # the prompt's, for `PrefixRouter.record`


class PrefixRouter:
    """A record, for each target, of the prefixes it was given, no larger than its cache.

    It is what the targets' caches probably hold: a target evicts in an order of its own, and holds
    answers too. A wrong guess costs time, never correctness. One thread; deterministic but for the
    secret that keys the hashes.
    """

    def __init__(self, num_pages: Sequence[int], page_size: int) -> None:
        """One target for each of `num_pages`, its cache in pages of `page_size` tokens."""
        self._block = -(-MIN_BLOCK // page_size) * page_size
        self._capacities = [pages * page_size for pages in num_pages]
        self._records: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in num_pages]
        self._secret = secrets.token_bytes(32)
        self._last = -1

    def choose(self, prompt: Prompt, salt: bytes, loads: Sequence[Load | None]) -> Route | None:
        """The target for a prompt; None if every load is None or no cache is as large as it.

        Follow it by `record`. One pass over the prompt: 2 ms for 100,000 tokens.
        """
        blocks = self._hashes(prompt, salt)
        matched = [self._match(record, blocks) for record in self._records]
        able = [
            load if len(prompt) < capacity else None
            for load, capacity in zip(loads, self._capacities, strict=True)
        ]
        target = pick(matched, able, self._last)
        if target is None:
            return None
        self._last = target
        most = max(m for m, load in zip(matched, able, strict=True) if load is not None)
        return Route(target, matched[target], most > matched[target], blocks)

    def record(self, route: Route) -> None:
        """Notes that the target has been given the prompt; forgets what it has not met for long."""
        record = self._records[route.target]
        # The first block last: of a chain the end is forgotten first, it is no use without a front.
        for block in reversed(route.blocks):
            record[block] = None
            record.move_to_end(block)
        while len(record) * self._block > self._capacities[route.target]:
            record.popitem(last=False)

    def forget(self, target: int) -> None:
        """The target's cache was flushed, or it is a new one."""
        self._records[target].clear()

    def _match(self, record: OrderedDict[bytes, None], blocks: list[bytes]) -> int:
        count = 0
        for block in blocks:
            if block not in record:
                break
            count += 1
        return count * self._block

    def _hashes(self, prompt: Prompt, salt: bytes) -> list[bytes]:
        """One for each whole block; it stands for all tokens up to the block's end and the salt.

        Each is BLAKE2b of the block's ids, salted with the hash before it; the first with a keyed
        hash of the salt, which nobody outside can know.
        """
        if not isinstance(prompt, np.ndarray):
            prompt = np.fromiter(prompt, np.int32, len(prompt))  # the quickest way from a list
        data = prompt.astype(np.int32, copy=False).tobytes()
        size = 4 * self._block
        above = blake2b(salt, digest_size=16, key=self._secret).digest()
        return [
            above := blake2b(data[at : at + size], digest_size=16, salt=above).digest()
            for at in range(0, len(data) - size + 1, size)
        ]
