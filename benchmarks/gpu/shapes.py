# SPDX-License-Identifier: MIT
"""Shapes of latent attention on a GPU, and what each must cost at least. Pure arithmetic.

A decode step reads every cached row once (1,152 bytes in bfloat16, 656 in float8), queries and
results once, and multiplies every query row (token x head) with every cached row twice: 576
features for scores, 512 for values. What finishes later, bytes or products, is the floor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

LATENT, ROPE, PAGE = 512, 64, 64
ROW_BYTES = {"bfloat16": 2 * (LATENT + ROPE), "float8": 656}


@dataclass(frozen=True)
class Roofs:
    """Measured rates of the device."""

    stream_bytes_s: float
    matrix_flop_s: float


@dataclass(frozen=True)
class MlaShape:
    """`batch` requests of `q_len` tokens each on sequences of about `kv_len`.

    `skewed`: half of the requests have an eighth of the length. `shared`: of all requests the same
    leading pages, all but the last one.
    """

    heads: int
    q_len: int
    batch: int
    kv_len: int
    cache: str = "bfloat16"
    skewed: bool = False
    shared: bool = False

    @property
    def rows(self) -> int:
        return self.heads * self.q_len

    @property
    def name(self) -> str:
        marks = (" skewed" if self.skewed else "") + (" shared" if self.shared else "")
        size = f"h{self.heads} q{self.q_len} b{self.batch} kv{self.kv_len}"
        return f"{size} {self.cache}{marks}"

    def lengths(self) -> list[int]:
        short = max(self.kv_len // 8, self.q_len)
        return [short if self.skewed and i % 2 else self.kv_len for i in range(self.batch)]

    def cached_tokens(self) -> int:
        """Tokens whose rows must be read; those that requests share count once."""
        if not self.shared:
            return sum(self.lengths())
        common = (self.kv_len - 1) // PAGE * PAGE
        return common + self.batch * (self.kv_len - common)

    def bytes(self) -> float:
        queries = self.batch * self.rows * (2 * LATENT + ROPE) * 2
        return float(self.cached_tokens() * ROW_BYTES[self.cache] + queries)

    def flops(self) -> float:
        return 2.0 * self.rows * sum(self.lengths()) * (2 * LATENT + ROPE)

    def floor_s(self, roofs: Roofs) -> float:
        return max(self.bytes() / roofs.stream_bytes_s, self.flops() / roofs.matrix_flop_s)


def decode_shapes(quick: bool = False) -> Iterator[MlaShape]:
    """The shapes that agents make: few and many rows, short and long contexts."""
    lengths = (4096, 51200) if quick else (4096, 16384, 51200, 131072)
    batches = (1, 8) if quick else (1, 4, 8, 32)
    rows = ((16, 1), (16, 4)) if quick else ((16, 1), (16, 2), (16, 4), (128, 1))
    for heads, q_len in rows:
        for batch in batches:
            for kv_len in lengths:
                yield MlaShape(heads, q_len, batch, kv_len)
    for batch in batches:
        yield MlaShape(16, 1, batch, 51200, cache="float8")
        yield MlaShape(16, 1, batch, 51200, skewed=True)
    yield MlaShape(16, 1, 8, 51200, shared=True)


def prefill_flops(heads: int, queries: int, prefix: int) -> float:
    """Of causal attention in the materialised form: 192 features of keys, 128 of values."""
    pairs = queries * prefix + queries * (queries + 1) / 2
    return 2.0 * heads * pairs * (192 + 128)
