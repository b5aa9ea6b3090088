# SPDX-License-Identifier: MIT
"""How many tokens were routed to each expert over the last steps. Knows no placements.

| block | block | ... | block | now        a window of steps is eight blocks and what came since
"""

from collections import deque

import torch
from torch import Tensor

BLOCKS = 8


class ExpertLoad:
    """Counts [num_layers, num_experts] over a moving window of about `window_steps` steps.

    Layers add to the rows of `now`; nothing else is done in a step, but for one in each block.
    """

    def __init__(
        self, num_layers: int, num_experts: int, *, window_steps: int, device: torch.device
    ) -> None:
        if window_steps < 1:
            raise ValueError(f"window_steps must be at least 1: {window_steps}")
        self.now = torch.zeros((num_layers, num_experts), dtype=torch.int64, device=device)
        self._block_steps = -(-window_steps // BLOCKS)
        self._blocks: deque[Tensor] = deque(maxlen=-(-window_steps // self._block_steps))
        self._num_steps = 0

    def end_step(self) -> None:
        """After each step, on the thread that runs them."""
        self._num_steps += 1
        if self._num_steps % self._block_steps == 0:
            self._blocks.append(self.now.clone())
            self.now.zero_()

    def window(self) -> Tensor:
        """[num_layers, num_experts] int64, a fresh tensor: this rank's counts."""
        return torch.stack([self.now, *self._blocks]).sum(0)
