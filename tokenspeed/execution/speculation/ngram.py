# SPDX-License-Identifier: MIT
"""`ngram`: what followed the latest occurrence of the n-gram that ends a request (prompt lookup).

The work is done in csrc/drafts. Knows each request by itself, and no salts as nothing is shared.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenspeed import _drafts
from tokenspeed.execution.speculation.drafter import Proposal


class NgramDrafter:
    """A `TokenDrafter`. The longest n-gram of `prompt_lookup_min` to `prompt_lookup_max` tokens.

    `ValueError` unless 1 <= prompt_lookup_min <= prompt_lookup_max <= 64. Source: Saxena, "Prompt
    Lookup Decoding", 2023; vLLM's method of that name.
    """

    name = "ngram"

    def __init__(self, prompt_lookup_min: int = 5, prompt_lookup_max: int = 5) -> None:
        self._drafts = _drafts.NgramDrafter(prompt_lookup_min, prompt_lookup_max)

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        self._drafts.add(request_id, prompt_ids)

    def extend(self, request_id: int, ids: Sequence[int]) -> None:
        self._drafts.extend(request_id, ids)

    def extend_all(
        self,
        request_ids: NDArray[np.uint64],
        num_ids: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> list[int]:
        return self._drafts.extend_all(request_ids, num_ids, ids)

    def propose(self, request_id: int, max_tokens: int) -> Proposal:
        return Proposal(*self._drafts.propose(request_id, max_tokens))

    def remove(self, request_id: int) -> None:
        self._drafts.remove(request_id)
