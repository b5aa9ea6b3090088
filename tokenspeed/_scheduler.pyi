# SPDX-License-Identifier: MIT
"""The control plane, compiled from csrc/scheduler: decides what runs next, owns slots and pages."""

import numpy as np
from numpy.typing import NDArray

from tokenspeed._policy import Pacing

FINISH_NONE: int  # 0: still running
FINISH_STOP: int  # 1: a stop token id
FINISH_LENGTH: int  # 2: max_tokens or the context
FINISH_ERROR: int  # 3: the row failed (NaN)
MISS_NONE: int  # 0: all of the prompt that could be found was
MISS_DIVERGED: int  # 1: the page before is cached, and goes on otherwise
MISS_EVICTED: int  # 2: the page was cached a while ago
MISS_NEVER_CACHED: int  # 3: as far as anybody remembers
MISS_DISABLED: int  # 4: nobody looked

class Scheduler:
    """Single-threaded. Raises `ValueError` for impossible options.

    Up to `overlap_depth + num_micro_steps` steps may be in flight; they commit in order.
    `num_micro_steps` is for pipelines: the steps in flight share the requests (chunks of one prompt
    may follow each other), and each takes an equal share of the decoding requests and of
    `max_num_batched_tokens`, rounded up. It excludes `overlap_depth` 1.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_partial_prefills: int = 4,
        overlap_depth: int = 0,
        num_micro_steps: int = 1,
        enable_prefix_caching: bool = True,
        hash_key: bytes | None = None,  # 16 secret bytes that key the prefix hashes; None: random
        record_events: bool = False,
        retention_share: float = 0.5,  # of the pages may be under retention or pinned
    ) -> None: ...
    def submit(
        self,
        request_id: int,  # 64-bit, unique among live requests
        prompt: NDArray[np.int32],  # [num_prompt_tokens]
        *,
        max_tokens: int,
        min_tokens: int = 0,
        stop_ids: NDArray[np.int32] | None = None,
        salt: bytes = b"",
        read_cache: bool = True,
        prompt_logprobs: bool = False,
        user: int = 0,  # 64 bits: users take turns by tokens computed; one alone: arrival order
        retention_s: float = 0.0,  # that its pages should stay after its end; at most seven days
        pinned: bool = False,  # ... until nothing else is left to evict
        tps_floor: float | None = None,  # tokens per second; None: the default, 0: none
        priority: int = 0,  # lower is sooner
        max_wait_s: float | None = None,  # for its first step; None: the default
    ) -> None:
        """Queues a request. `ValueError`: empty, too long, duplicate id, can never fit, or a floor
        or wait though there is no pacing."""
    def pace(self, pacing: Pacing) -> None:
        """Asks it from now on what a step may have and who may run. `ValueError`: there have been
        requests, `num_micro_steps` is above 1, or events are recorded."""
    def abort(self, request_id: int) -> bool:
        """Ends a request in any state; False if it is unknown or over. No update follows it."""
    def speculate(self, request_id: int, draft: NDArray[np.int32], num_propose: int = 0) -> bool:
        """For the request's next row that samples: `draft`, guesses at what follows the tokens it
        has now, to be verified, and how many further ids the device shall propose.

        Shortened silently to what fits. A later call replaces it. False: no such live request.
        `ValueError`: a negative id or number. With `overlap_depth` 1 a request that speculates is
        in one step at a time.
        """
    def next_plan(self) -> NDArray[np.int32] | None:
        """The next step's Plan (csrc/scheduler/plan.h), or None when nothing can run now.

        None although steps are in flight: ask again when the oldest has committed. `ValueError`:
        `overlap_depth + num_micro_steps` steps are not committed yet.
        """
    def commit(self, result: NDArray[np.int32]) -> Updates:
        """Takes the StepResult of the oldest plan in flight. `ValueError`: malformed or late."""
    def match_prefix(self, tokens: NDArray[np.int32], salt: bytes = b"") -> int:
        """How many of these tokens are cached, as a request submitted now would find.

        Changes nothing, not even which page is evicted next. Time grows with what it finds.
        """
    def advance(self, now_s: float) -> None:
        """Tells the time, in seconds of a monotonic clock from 0 on; an earlier one is ignored.

        Deadlines count from the last time told: tell it before each step, and with pacing before
        each request and each commit too.
        """
    def retain(
        self,
        tokens: NDArray[np.int32],
        salt: bytes = b"",
        *,
        retention_s: float = 0.0,
        pinned: bool = False,
    ) -> int:
        """Puts the cached full pages of these tokens under retention; returns how many there are.

        With neither argument: takes retention back from those on which no other branch builds.
        """
    def release(self, tokens: NDArray[np.int32], salt: bytes = b"") -> int:
        """Drops the cached pages of these tokens that nobody uses and on which no other branch
        builds, the deepest first; returns how many."""
    def has_work(self) -> bool:
        """Whether any request is waiting, running, or draining."""
    def stats(self) -> Stats: ...
    def flush_cache(self) -> int:
        """Drops every cached page that no request uses; returns how many."""
    def check_invariants(self) -> None:
        """Raises `RuntimeError` naming the first broken invariant. O(everything); for tests."""
    def events(self) -> bytes:
        """The event log since construction, prompts included; empty unless record_events=True."""

class Updates:
    """What one commit produced: one entry per request that got tokens or ended, flat arrays."""

    request_ids: NDArray[np.uint64]  # [n]
    finish: NDArray[np.int32]  # [n] FINISH_*
    num_ids: NDArray[np.int32]  # [n] new ids of each request
    num_cached: NDArray[np.int32]  # [n] prompt tokens served from the prefix cache
    ids: NDArray[np.int32]  # [sum(num_ids)]
    receipt_ids: NDArray[np.uint64]  # [k] requests that have their first entry
    receipt_miss: NDArray[np.int32]  # [k] MISS_*: why not more of the prompt was found
    receipt_kept_us: NDArray[np.int64]  # [k] that the prompt's pages are meant to stay

class Stats:
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int  # in the prefix index, used by no request
    num_preemptions: int
    prefix_queries: int  # prompt tokens looked up, cumulative
    prefix_hits: int  # prompt tokens found, cumulative
    num_steps: int
    num_retained_pages: int  # used or not
    num_pinned_pages: int

def replay(events: bytes) -> list[NDArray[np.int32]]:
    """Re-runs an event log on a fresh scheduler; returns every plan it made, in order.

    `ValueError`: not an event log, or cut short.
    """
