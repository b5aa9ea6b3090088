# SPDX-License-Identifier: MIT
"""Drafts from tokens alone, compiled from csrc/drafts. One thread at a time.

`ValueError`: a negative id or count, a request that is there already, bounds that exclude each
other. `KeyError`: no such request. Token ids are in [0, 2**31). `add` and
`remove` give the interpreter's lock away. `propose` answers at most `max_tokens` ids and the length
of the match; `extend` the lengths of the matches [R] after the next `num_ids[r]` of ids each.
"""

import numpy as np
from numpy.typing import NDArray

class NgramDrafter:
    """The longest n-gram that occurred before in the request; what followed its latest one."""

    def __init__(self, prompt_lookup_min: int, prompt_lookup_max: int) -> None: ...
    def add(self, request_id: int, prompt_ids: NDArray[np.int32]) -> None: ...
    def extend(
        self,
        request_ids: NDArray[np.uint64],
        num_ids: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> list[int]: ...
    def propose(self, request_id: int, max_tokens: int) -> tuple[list[int], int]: ...
    def remove(self, request_id: int) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...  # of the tokens and their tables

class SuffixDrafter:
    """The longest suffix seen before, in the session or the salt's recent outputs; its most
    frequent continuation. `shared_store_tokens` bounds the outputs, `kept_tokens` the histories of
    ended requests; 0: none."""

    def __init__(self, min_match: int, shared_store_tokens: int, kept_tokens: int) -> None: ...
    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None: ...
    def extend(
        self,
        request_ids: NDArray[np.uint64],
        num_ids: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> list[int]: ...
    def propose(self, request_id: int, max_tokens: int) -> tuple[list[int], int]: ...
    def remove(self, request_id: int) -> None: ...
    def forget_ended(self) -> None: ...  # histories and outputs
    @property
    def num_tokens(self) -> int: ...  # of live requests, histories and outputs
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_kept_tokens(self) -> int: ...
    @property
    def num_stored_tokens(self) -> int: ...
