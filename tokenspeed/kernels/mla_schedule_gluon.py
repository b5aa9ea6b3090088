# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Which pages each CTA of the latent-attention kernel reads: worked out on the device, exactly fit.

The work of a step is a line of units, one unit being one tile of 64 keys under one block of query
rows; strips of the batch come one after the other, in each its blocks, in each block its tiles:

    units:   | strip 0: block 0 tiles 0..6 | block 1 tiles 0..6 | strip 1: block 0 tiles 0..2 | ...
    CTA c:   [c * total / parts, (c + 1) * total / parts)          parts = min(CTAs, total)

A strip is a row of the batch with all its keys. Where requests share leading pages (SHARED, see
`mla_shared.py`), a row has two: strip 2r is the shared keys under the queries of the whole group,
if r leads one, and strip 2r + 1 is the row's own keys behind them.

Every CTA derives its piece from `q_start` and `kv_len` (and `groups`) alone, so that there is no
host plan, no kernel for metadata, and nothing to go stale under a captured graph. A pair (CTA,
block) that share units writes its partial result to slot CTA + item, item being the block's place
in the line: along the line one of the two grows from pair to pair, so slots differ.
`csrc/cuda/mla_schedule.h` is the same arithmetic in C++ for rows alone, tests compare them.
Knows no attention.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = gl.constexpr(64)  # keys of a unit
CHUNK = gl.constexpr(256)  # strips that are looked at together


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def strip_of(tables, index, inside, SHARED: gl.constexpr):
    """(first query token, queries, first tile, tokens, free) of a strip or of a vector of them.

    Query i sees the keys below tokens - queries + free + i + 1, and tokens at most.
    """
    q_start, kv_len, groups = tables
    row = index // (SHARED + 1)
    first = gl.load(q_start + row, mask=inside, other=0)
    tokens = gl.load(kv_len + row, mask=inside, other=0)
    if SHARED:
        common = index % 2 == 0
        leads = gl.load(groups + row * 3, mask=inside, other=0) == row
        end = gl.load(groups + row * 3 + 1, mask=inside, other=0)
        tiles = gl.load(groups + row * 3 + 2, mask=inside, other=0)
        behind = gl.load(q_start + gl.where(common, end, row + 1), mask=inside, other=0)
        queries = gl.where(common & ((leads == 0) | (tiles == 0)), 0, behind - first)
        tokens = gl.where(common, tiles * TILE, tokens)
        first_tile = gl.where(common, 0, tiles)
        free = gl.where(common, queries, 0)
    else:
        queries = gl.load(q_start + row + 1, mask=inside, other=0) - first
        first_tile = row * 0
        free = row * 0
    return first, queries, first_tile, tokens, free


@gluon.jit
def blocks_and_tiles(queries, first_tile, tokens, HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """Blocks of query rows, and tiles of keys under each; (0, 0) for a strip without either."""
    blocks = (queries * HEADS + BLOCK - 1) // BLOCK
    tiles = gl.maximum((tokens + TILE - 1) // TILE - first_tile, 0)
    return gl.where(tiles > 0, blocks, 0), gl.where(queries > 0, tiles, 0)


@gluon.jit
def chunk_of_strips(
    tables, first, strips,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(index, inside, blocks, units) of CHUNK strips from `first` on."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    index = first + gl.arange(0, CHUNK, layout)
    inside = index < strips
    _, queries, first_tile, tokens, _ = strip_of(tables, index, inside, SHARED)
    blocks, tiles = blocks_and_tiles(queries, first_tile, tokens, HEADS, BLOCK)
    return index, inside, blocks, blocks * tiles


@gluon.jit
def sums_before(
    tables, strip, strips,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(units, items) before a strip, and units in all."""
    base, items, total = 0, 0, 0
    for first in range(0, strips, CHUNK):
        index, _inside, blocks, units = chunk_of_strips(
            tables, first, strips, SHARED, HEADS, BLOCK, WARPS
        )
        base += gl.sum(gl.where(index < strip, units, 0), 0)
        items += gl.sum(gl.where(index < strip, blocks, 0), 0)
        total += gl.sum(units, 0)
    return base, items, total


@gluon.jit
def span_start(cta, total, parts):
    """The first unit of a CTA."""
    return (cta.to(gl.int64) * total // gl.maximum(parts, 1)).to(gl.int32)


@gluon.jit
def owner(unit, total, parts):
    """The CTA that computes a unit."""
    return (((unit + 1).to(gl.int64) * parts - 1) // gl.maximum(total, 1)).to(gl.int32)


@gluon.jit
def locate(
    tables, strips,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(begin, end, strip, base, items): this CTA's units, the first's strip, what is before it."""
    total = sums_before(tables, 0, strips, SHARED, HEADS, BLOCK, WARPS)[2]
    parts = gl.minimum(gl.num_programs(0), total)
    cta = gl.minimum(gl.program_id(0), parts)
    begin = span_start(cta, total, parts)
    end = span_start(gl.minimum(cta + 1, parts), total, parts)
    strip, base, items, seen = 0, 0, 0, 0
    for first in range(0, strips, CHUNK):
        _index, inside, blocks, units = chunk_of_strips(
            tables, first, strips, SHARED, HEADS, BLOCK, WARPS
        )
        past = (gl.associative_scan(units, 0, _plus) + seen <= begin) & inside
        strip += gl.sum(past.to(gl.int32), 0)
        base += gl.sum(gl.where(past, units, 0), 0)
        items += gl.sum(gl.where(past, blocks, 0), 0)
        seen += gl.sum(units, 0)
    return begin, end, strip, base, items


@gluon.jit
def start_of(work, tables, SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr):
    """(unit, strip, block, tile, item) of a CTA's first unit; without units, an empty walk."""
    begin, end, strip, base, items = work
    block, tile = 0, 0
    if begin < end:
        _, queries, first_tile, tokens, _ = strip_of(tables, strip, True, SHARED)
        _, tiles = blocks_and_tiles(queries, first_tile, tokens, HEADS, BLOCK)
        block = (begin - base) // tiles
        tile = (begin - base) % tiles
    return begin, strip, block, tile, items + block


@gluon.jit
def visible_tiles(
    block, queries, first_tile, tokens, free, HEADS: gl.constexpr, BLOCK: gl.constexpr
):
    """Tiles of a strip with a key that the last query row of a block may see; 1 at least."""
    last = gl.minimum((block * BLOCK + BLOCK + HEADS - 1) // HEADS, queries)
    seen = gl.minimum(tokens - queries + free + last, tokens)
    return (seen + TILE - 1) // TILE - first_tile


@gluon.jit
def next_block(unit, strip, block, item, count, blocks):
    """The walk after `count` units of a block: (unit, strip, block, tile, item)."""
    done = block + 1 >= blocks
    strip = gl.where(done, strip + 1, strip)
    step = gl.where(blocks > 0, 1, 0)
    return unit + count, strip, gl.where(done, 0, block + 1), 0, item + step
