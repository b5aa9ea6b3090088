# SPDX-License-Identifier: MIT
"""The control plane, compiled from csrc/scheduler: decides what runs next, owns slots and pages."""

import numpy as np
from numpy.typing import NDArray

FINISH_NONE: int  # 0: still running
FINISH_STOP: int  # 1: a stop token id
FINISH_LENGTH: int  # 2: max_tokens or the context
FINISH_ERROR: int  # 3: the row failed (NaN)

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
    ) -> None:
        """Queues a request. `ValueError`: empty, too long, duplicate id, can never fit."""
    def abort(self, request_id: int) -> bool:
        """Ends a request in any state; False if it is unknown or over. No update follows it."""
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

def replay(events: bytes) -> list[NDArray[np.int32]]:
    """Re-runs an event log on a fresh scheduler; returns every plan it made, in order.

    `ValueError`: not an event log, or cut short.
    """
