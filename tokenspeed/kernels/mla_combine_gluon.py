# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Merges the partial results of latent attention, with the value up-projection where it is wanted.

out = sum_i 2^(lse_i - max) y_i / sum_i 2^(lse_i - max), arXiv:2501.01005 section 2.2 in base 2.
Where a query's partials stand follows from the schedule's arithmetic (`mla_schedule_gluon.py`). All
partials of a program are read side by side, not one after the other: with one request a hundred of
them wait in the L2 cache. Refuses to know keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.mla_schedule_gluon import (
    CHUNK,
    blocks_and_tiles,
    owner,
    strip_of,
    sums_before,
    visible_tiles,
)

LATENT = gl.constexpr(512)


@gluon.jit
def _partials_in(
    strip, token, head, tables, strips, num_ctas,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(slot, count, line in the slot) of a query row in one strip; count 0 in an empty one."""
    base, items, total = sums_before(tables, strip, strips, SHARED, HEADS, BLOCK, WARPS)
    first, queries, first_tile, tokens, free = strip_of(tables, strip, True, SHARED)
    blocks, tiles = blocks_and_tiles(queries, first_tile, tokens, HEADS, BLOCK)
    place = (token - first) * HEADS + head
    block = place // BLOCK
    parts = gl.minimum(num_ctas, total)
    unit = base + block * tiles
    seen = visible_tiles(block, queries, first_tile, tokens, free, HEADS, BLOCK)
    owned = owner(unit, total, parts)
    count = owner(unit + seen - 1, total, parts) - owned + 1
    return owned + items + block, gl.where(blocks > 0, count, 0), place % BLOCK


@gluon.jit
def row_of(token, q_start, rows, WARPS: gl.constexpr):
    """The row of the batch that has a token; `rows` if none has it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row = 0
    for first in range(0, rows, CHUNK):
        at = first + gl.arange(0, CHUNK, layout)
        end = gl.load(q_start + at + 1, mask=at < rows, other=2147483647)
        row += gl.sum((end <= token).to(gl.int32), 0)
    return row


@gluon.jit
def partials_of(
    token, head, q_start, kv_len, groups, rows, num_ctas,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Where a query row's partials stand: (slot, count, line) of its own keys, and of shared ones.

    Both counts are 0 for a token that no row has.
    """
    tables = (q_start, kv_len, groups)
    row = row_of(token, q_start, rows, WARPS)
    slot, count, line = 0, 0, 0
    other_slot, other_count, other_line = 0, 0, 0
    if row < rows:
        strips = rows * (SHARED + 1)
        slot, count, line = _partials_in(
            row * (SHARED + 1) + SHARED, token, head, tables, strips, num_ctas,
            SHARED, HEADS, BLOCK, WARPS,
        )  # fmt: skip
        if SHARED:
            leader = gl.load(groups + row * 3)
            other_slot, other_count, other_line = _partials_in(
                leader * 2, token, head, tables, strips, num_ctas, SHARED, HEADS, BLOCK, WARPS
            )
    return (slot, count, line), (other_slot, other_count, other_line)


@gluon.jit
def merge(
    partial, sums, own, shared, first_feature,
    BLOCK: gl.constexpr, WIDTH: gl.constexpr, SPLITS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[WIDTH] features of one query row from all its partials, SPLITS of them read at once."""
    lane = gl.arange(0, SPLITS, gl.SliceLayout(1, LAYOUT))
    feature = first_feature + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    count = own[1] + shared[1]
    peak = gl.full([SPLITS], -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    for first in range(0, count, SPLITS):
        at = _line_of(first + lane, own, shared, BLOCK)
        peak = gl.maximum(peak, gl.load(sums + at, mask=first + lane < count, other=-float("inf")))
    top = gl.max(peak, 0)
    acc = gl.zeros([SPLITS, WIDTH], gl.float32, LAYOUT)
    norm = gl.zeros([SPLITS], gl.float32, gl.SliceLayout(1, LAYOUT))
    for first in range(0, count, SPLITS):
        inside = first + lane < count
        at = _line_of(first + lane, own, shared, BLOCK)
        share = gl.exp2(gl.load(sums + at, mask=inside, other=-float("inf")) - top)
        where = at[:, None] * LATENT + feature[None, :]
        mask = inside[:, None] & (feature >= 0)[None, :]
        acc += share[:, None] * gl.load(partial + where, mask=mask, other=0.0)
        norm += share
    whole = gl.sum(norm, 0)
    return gl.sum(acc, 0) / gl.where(whole > 0.0, whole, 1.0)


@gluon.jit
def _line_of(index, own, shared, BLOCK: gl.constexpr):
    """The line in memory of the index-th partial: first those of own keys, then of shared ones."""
    mine = index < own[1]
    slot = gl.where(mine, own[0] + index, shared[0] + index - own[1])
    return slot.to(gl.int64) * BLOCK + gl.where(mine, own[2], shared[2])


@gluon.jit(do_not_specialize=["rows"])
def mla_combine(
    partial, sums, q_start, kv_len, groups, out, rows, num_ctas,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    WIDTH: gl.constexpr, SPLITS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """out[T, H, 512]; grid (T * H * 512 / WIDTH): WIDTH features of a query row each."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    pieces: gl.constexpr = LATENT // WIDTH
    query = gl.program_id(0) // pieces
    first = gl.program_id(0) % pieces * WIDTH
    own, shared = partials_of(
        query // HEADS, query % HEADS, q_start, kv_len, groups, rows, num_ctas,
        SHARED, HEADS, BLOCK, WARPS,
    )  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    y = merge(partial, sums, own, shared, first, BLOCK, WIDTH, SPLITS, layout)
    feature = first + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    gl.store(out + query.to(gl.int64) * LATENT + feature, y.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["rows", "num_tokens"])
def mla_combine_up(
    partial, sums, q_start, kv_len, groups, w_uv, out, rows, num_ctas, num_tokens,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    VALUE: gl.constexpr, PIECE: gl.constexpr,
    SPLITS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out[T, H, VALUE]; grid (HEADS * VALUE / PIECE, token groups); weights before the wait."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    weights: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    pieces: gl.constexpr = VALUE // PIECE
    head = gl.program_id(0) // pieces
    value = gl.program_id(0) % pieces * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, weights))
    feature = gl.arange(0, LATENT, gl.SliceLayout(0, weights))
    w = gl.load(w_uv + (head * VALUE + value)[:, None] * LATENT + feature[None, :])
    gdc_wait()
    gdc_launch_dependents()
    for token in range(gl.program_id(1), num_tokens, gl.num_programs(1)):
        own, shared = partials_of(
            token, head, q_start, kv_len, groups, rows, num_ctas, SHARED, HEADS, BLOCK, WARPS
        )
        y = merge(partial, sums, own, shared, 0, BLOCK, LATENT, SPLITS, layout)
        y = gl.convert_layout(y, gl.SliceLayout(0, weights))
        result = gl.sum(w.to(gl.float32) * y[None, :], 1)
        at = (token * HEADS + head).to(gl.int64) * VALUE
        gl.store(out + at + value, result.to(gl.bfloat16))
