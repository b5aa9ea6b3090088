# SPDX-License-Identifier: MIT
"""`suffix`: the most frequent continuation of the longest suffix that was seen before.

Looks into the session's own history first, then, where that matches more, into recent outputs of
requests with the same salt. Knows no acceptance.
"""

import numpy as np
from numpy.typing import NDArray

from tokenspeed import _drafts
from tokenspeed.execution.speculation.compiled import CompiledDrafter

KEPT_TOKENS = 1 << 21  # some 80 MB


class SuffixDrafter(CompiledDrafter):
    """Proposes nothing for matches shorter than `suffix_min_match`.

    `shared_store_tokens` bounds the outputs kept of all salts together, `kept_tokens` the histories
    of ended requests, which the next turn of a session takes over; 0: none. `ValueError`:
    `suffix_min_match` below 1, or a bound below 0. Source: Ukkonen, "On-line construction of suffix
    trees", 1995; the method is that of Oliaro et al., "SuffixDecoding", arXiv:2411.04975, with
    matches of any length.
    """

    name = "suffix"

    def __init__(
        self,
        suffix_min_match: int,
        shared_store_tokens: int,
        kept_tokens: int = KEPT_TOKENS,
    ) -> None:
        self._drafts = _drafts.SuffixDrafter(suffix_min_match, shared_store_tokens, kept_tokens)
        super().__init__(self._drafts)

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        self._drafts.add(request_id, prompt_ids, salt)

    def forget_ended(self) -> None:
        self._drafts.forget_ended()
