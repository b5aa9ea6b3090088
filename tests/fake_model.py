# SPDX-License-Identifier: MIT
"""A model without weights whose next token is a hash of every token it reads from the KV cache.

Any mix-up of pages, slots or positions therefore changes what comes out. The cache keeps, for each
token, its id and its position; both are checked against what the batch says.
"""

import itertools
from types import SimpleNamespace

import torch

from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.layers.layer import Target

MODULUS = 1_000_003


class FakeModel:
    """`CausalLM`'s interface over a hash."""

    target = Target(torch.device("cpu"), torch.float32)
    spmd = SimpleNamespace(samples=True, peers=None)  # one rank
    modules = staticmethod(tuple)

    def __init__(self, vocab_size: int = 101, max_position: int = 4096) -> None:
        self.vocab_size, self.max_position = vocab_size, max_position
        self.batch_sizes: list[int] = []
        self.aux_hidden: list[torch.Tensor] = []
        self.fail_on: int | None = None  # token id that poisons whoever reads it

    def cache_specs(self, dtype: torch.dtype | None = None) -> list[CacheSpec]:
        return [CacheSpec(((2,),), torch.int64)]

    def forward(self, batch: ForwardBatch, caches: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """[T, 1] float64: the hash of the sequence up to each token, as read from its pages."""
        assert int(batch.token_ids.min()) >= 0, "no model can look this id up"
        cache = caches[0][0]
        page_size = cache.shape[1]
        flat = cache.view(-1, 2)
        flat[batch.cache_index, 0] = batch.token_ids
        flat[batch.cache_index, 1] = batch.positions.long()
        starts, ends = batch.q_start.tolist(), batch.kv_len.tolist()
        self.batch_sizes.append(len(ends))
        assert batch.max_q_len >= max(b - a for a, b in itertools.pairwise(starts))
        assert batch.max_kv_len >= max(ends)
        hidden: list[float] = []
        for row, slot in enumerate(batch.slots.tolist()):
            positions = torch.arange(ends[row])
            pages = batch.page_table[slot][positions // page_size].long()
            entries = flat[pages * page_size + positions % page_size]
            assert torch.equal(entries[:, 1], positions), "foreign or unwritten KV was read"
            ids = entries[:, 0].tolist()
            count = starts[row + 1] - starts[row]
            hidden += self._states(ids)[-count:]
        return torch.tensor(hidden, dtype=torch.float64)[:, None]

    def _states(self, ids: list[int]) -> list[float]:
        """The hash after each token; NaN from the poisoned token on."""
        states, state, poisoned = [], 1, False
        for token in ids:
            state = (state * 131 + token + 1) % MODULUS
            poisoned = poisoned or token == self.fail_on
            states.append(float("nan") if poisoned else float(state))
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, 1] -> [L, vocab_size] float32 in [0, 8), a function of state and token."""
        tokens = torch.arange(1, self.vocab_size + 1, dtype=torch.float64)
        noise = ((hidden * 7919 + 17) * tokens + tokens * tokens * 104729) % MODULUS
        return (noise / MODULUS * 8).float()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What greedy decoding must give, computed without pages."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(self.states(ids)[-1:]).argmax()))
        return ids[len(prompt) :]

    def states(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), 1] float64: the hidden states of one sequence, computed without pages."""
        return torch.tensor(self._states(ids), dtype=torch.float64)[:, None]
