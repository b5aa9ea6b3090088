# SPDX-License-Identifier: MIT
"""`CompiledDrafter`: a `TokenDrafter` whose work is done in csrc/drafts. Knows no method."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from tokenspeed import _drafts
from tokenspeed.execution.speculation.drafter import Proposal


class CompiledDrafter(ABC):
    """What all of them have in common; `add` and what is kept is each one's own."""

    name: str

    def __init__(self, drafts: _drafts.NgramDrafter | _drafts.SuffixDrafter) -> None:
        self._inner = drafts

    @abstractmethod
    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        """A request begins."""

    @abstractmethod
    def forget_ended(self) -> None:
        """Drops what was kept of requests that ended."""

    def extend(
        self,
        request_ids: NDArray[np.uint64],
        num_ids: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> list[int]:
        return self._inner.extend(request_ids, num_ids, ids)

    def propose(self, request_id: int, max_tokens: int) -> Proposal:
        return Proposal(*self._inner.propose(request_id, max_tokens))

    def remove(self, request_id: int) -> None:
        self._inner.remove(request_id)
