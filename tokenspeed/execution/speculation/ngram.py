# SPDX-License-Identifier: MIT
"""`ngram`: what followed the latest occurrence of the n-gram that ends a request (prompt lookup).

Knows each request by itself, and no salts as nothing is shared.
"""

import numpy as np
from numpy.typing import NDArray

from tokenspeed import _drafts
from tokenspeed.execution.speculation.compiled import CompiledDrafter


class NgramDrafter(CompiledDrafter):
    """The longest n-gram of `prompt_lookup_min` to `prompt_lookup_max` tokens.

    `ValueError` unless 1 <= prompt_lookup_min <= prompt_lookup_max <= 64. Source: Saxena, "Prompt
    Lookup Decoding", 2023; vLLM's method of that name.
    """

    name = "ngram"

    def __init__(self, prompt_lookup_min: int, prompt_lookup_max: int) -> None:
        self._drafts = _drafts.NgramDrafter(prompt_lookup_min, prompt_lookup_max)
        super().__init__(self._drafts)

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        self._drafts.add(request_id, prompt_ids)

    def forget_ended(self) -> None:
        """Nothing is kept."""
