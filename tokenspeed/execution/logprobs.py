# SPDX-License-Identifier: MIT
"""Logits -> `TokenLogprobs`: the log-probabilities that clients see, from the raw logits.

Knows neither slots nor requests, nor what sampling did to the logits afterwards.
"""

import torch

from tokenspeed.execution.sampling_params import TokenLogprobs
from tokenspeed.kernels.registry import select


class LogprobsReader:
    """Reads log-probabilities out of logits with the kernel chosen for the device."""

    def __init__(self, device: torch.device) -> None:
        self._kernel = select("logprobs", device=device)

    def read(
        self, logits: torch.Tensor, ids: torch.Tensor, num_top: list[int]
    ) -> list[TokenLogprobs]:
        """logits [B, vocab_size] float32, ids [B] int64, num_top [B] likeliest tokens wanted."""
        most = min(max(num_top), logits.shape[1])
        tensors = self._kernel(logits, ids, most)
        chosen, rank, top_ids, top = (tensor.tolist() for tensor in tensors)
        return [
            TokenLogprobs(
                [token, *top_ids[row][:k]],
                [chosen[row], *top[row][:k]],
                [rank[row], *range(1, min(k, most) + 1)],
            )
            for row, (token, k) in enumerate(zip(ids.tolist(), num_top, strict=True))
        ]
