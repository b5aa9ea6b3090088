# SPDX-License-Identifier: MIT
"""`DraftPages`: where a drafter writes what stands beyond the pages that a sequence has.

They are pages of the drafter's own tensors behind all that the scheduler knows, a few for each
slot, lent to the page table while a chain is drafted. Knows no weights and no requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tokenspeed.execution.kv_cache import pages_of
from tokenspeed.execution.speculation.backlog import Ints
from tokenspeed.execution.speculation.draft_rows import ragged


class DraftPages:
    """From `first_page` on: enough for `max_depth` tokens of each slot, from a page's begin."""

    def __init__(self, first_page: int, page_size: int, max_depth: int) -> None:
        self._first, self._page_size = first_page, page_size
        self._per_slot = pages_of(max_depth, page_size)

    @staticmethod
    def count(max_num_seqs: int, page_size: int, max_depth: int) -> int:
        """How many there are."""
        return max_num_seqs * pages_of(max_depth, page_size)

    @contextmanager
    def lent(self, table: Tensor, slots: Ints, limits: Ints, ends: Ints) -> Iterator[None]:
        """Positions [limits, ends) of these slots have pages inside the block.

        Pages that `limits` lie in are the sequences' own to their ends. The table [slots, pages] is
        as it was afterwards: its entries may be those of pages given ahead.
        """
        begin = -(-limits // self._page_size)
        counts = np.maximum(-(-ends // self._page_size) - begin, 0)
        if not counts.any():
            yield
            return
        of = np.repeat(slots, counts)
        pages = self._first + ragged(slots * self._per_slot, counts)
        at = torch.from_numpy(np.stack([of, ragged(begin, counts), pages])).to(table.device)
        before = table[at[0], at[1]]
        table[at[0], at[1]] = at[2].to(table.dtype)
        try:
            yield
        finally:
            table[at[0], at[1]] = before
