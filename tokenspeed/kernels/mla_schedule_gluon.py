# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Which pages each CTA of the latent-attention kernel reads: worked out on the device, exactly fit.

The work of a step is a line of units, one unit being one tile of 64 keys under one block of query
rows; rows of the batch come one after the other, in each its blocks, in each block its tiles:

    units:   | row 0: block 0 tiles 0..6 | block 1 tiles 0..6 | row 1: block 0 tiles 0..2 | ...
    CTA c:   [c * total / parts, (c + 1) * total / parts)         parts = min(CTAs, total)

Every CTA derives its piece from `q_start` and `kv_len` alone, so that there is no host plan, no
kernel for metadata, and nothing to go stale under a captured graph. A pair (CTA, block) that share
units writes its partial result to slot CTA + item, item being the block's place in the line: along
the line one of the two grows from pair to pair, so slots differ. `csrc/cuda/mla_schedule.h` is the
same arithmetic in C++, tests compare them. Knows no attention.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = gl.constexpr(64)  # keys of a unit
CHUNK = gl.constexpr(256)  # rows of the batch that are looked at together


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def blocks_and_tiles(queries, tokens, HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """Blocks of query rows, and tiles of keys under each; (0, 0) for a row without either."""
    blocks = (queries * HEADS + BLOCK - 1) // BLOCK
    tiles = (tokens + TILE - 1) // TILE
    return gl.where(tokens > 0, blocks, 0), gl.where(queries > 0, tiles, 0)


@gluon.jit
def chunk_of_rows(
    q_start, kv_len, first, rows,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(inside, blocks, units) of CHUNK rows of the batch from `first` on."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row = first + gl.arange(0, CHUNK, layout)
    inside = row < rows
    begin = gl.load(q_start + row, mask=inside, other=0)
    queries = gl.load(q_start + row + 1, mask=inside, other=0) - begin
    tokens = gl.load(kv_len + row, mask=inside, other=0)
    blocks, tiles = blocks_and_tiles(queries, tokens, HEADS, BLOCK)
    return inside, blocks, blocks * tiles


@gluon.jit
def total_units(
    q_start, kv_len, rows, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr
):
    """Units of the whole batch."""
    total = 0
    for first in range(0, rows, CHUNK):
        _, _, units = chunk_of_rows(q_start, kv_len, first, rows, HEADS, BLOCK, WARPS)
        total += gl.sum(units, 0)
    return total


@gluon.jit
def span_start(cta, total, parts):
    """The first unit of a CTA."""
    return (cta.to(gl.int64) * total // gl.maximum(parts, 1)).to(gl.int32)


@gluon.jit
def owner(unit, total, parts):
    """The CTA that computes a unit."""
    return (((unit + 1).to(gl.int64) * parts - 1) // gl.maximum(total, 1)).to(gl.int32)


@gluon.jit
def locate(q_start, kv_len, rows, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """(begin, end, row, base, items): this CTA's units, the first's row, what is before that."""
    total = total_units(q_start, kv_len, rows, HEADS, BLOCK, WARPS)
    parts = gl.minimum(gl.num_programs(0), total)
    cta = gl.minimum(gl.program_id(0), parts)
    begin = span_start(cta, total, parts)
    end = span_start(gl.minimum(cta + 1, parts), total, parts)
    row, base, items, seen = 0, 0, 0, 0
    for first in range(0, rows, CHUNK):
        inside, blocks, units = chunk_of_rows(q_start, kv_len, first, rows, HEADS, BLOCK, WARPS)
        past = (gl.associative_scan(units, 0, _plus) + seen <= begin) & inside
        row += gl.sum(past.to(gl.int32), 0)
        base += gl.sum(gl.where(past, units, 0), 0)
        items += gl.sum(gl.where(past, blocks, 0), 0)
        seen += gl.sum(units, 0)
    return begin, end, row, base, items


@gluon.jit
def start_of(work, q_start, kv_len, HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """(unit, row, block, tile, item) of a CTA's first unit; without units, an empty walk."""
    begin, end, row, base, items = work
    block, tile = 0, 0
    if begin < end:
        queries = gl.load(q_start + row + 1) - gl.load(q_start + row)
        _, tiles = blocks_and_tiles(queries, gl.load(kv_len + row), HEADS, BLOCK)
        block = (begin - base) // tiles
        tile = (begin - base) % tiles
    return begin, row, block, tile, items + block


@gluon.jit
def visible_tiles(block, queries, tokens, HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """Tiles with a key that the last query row of a block may see."""
    last = gl.minimum((block * BLOCK + BLOCK + HEADS - 1) // HEADS, queries)
    return (tokens - queries + last + TILE - 1) // TILE


@gluon.jit
def next_block(unit, row, block, item, count, blocks):
    """The walk after `count` units of a block: (unit, row, block, tile, item)."""
    done = block + 1 >= blocks
    row = gl.where(done, row + 1, row)
    step = gl.where(blocks > 0, 1, 0)
    return unit + count, row, gl.where(done, 0, block + 1), 0, item + step
