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
    chunk_of_rows,
    owner,
    visible_tiles,
)

LATENT = gl.constexpr(512)


@gluon.jit
def partials_of(
    token, head, q_start, kv_len, rows, num_ctas,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(slot, count, line in the slot) of a query row; count 0 for a token that no row has."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row, base, items, total = 0, 0, 0, 0
    for first in range(0, rows, CHUNK):
        inside, blocks, units = chunk_of_rows(q_start, kv_len, first, rows, HEADS, BLOCK, WARPS)
        at = first + gl.arange(0, CHUNK, layout)
        past = (gl.load(q_start + at + 1, mask=inside, other=0) <= token) & inside
        row += gl.sum(past.to(gl.int32), 0)
        base += gl.sum(gl.where(past, units, 0), 0)
        items += gl.sum(gl.where(past, blocks, 0), 0)
        total += gl.sum(units, 0)
    slot, count, line = 0, 0, 0
    if row < rows:
        start = gl.load(q_start + row)
        queries = gl.load(q_start + row + 1) - start
        tokens = gl.load(kv_len + row)
        _, tiles = blocks_and_tiles(queries, tokens, HEADS, BLOCK)
        place = (token - start) * HEADS + head
        block = place // BLOCK
        line = place % BLOCK
        parts = gl.minimum(num_ctas, total)
        unit = base + block * tiles
        seen = visible_tiles(block, queries, tokens, HEADS, BLOCK)
        owned = owner(unit, total, parts)
        slot = owned + items + block
        count = owner(unit + seen - 1, total, parts) - owned + 1
    return slot, count, line


@gluon.jit
def merge(
    partial, sums, slot, count, line, first_feature,
    BLOCK: gl.constexpr, WIDTH: gl.constexpr, SPLITS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """[WIDTH] features of one query row from `count` partials, SPLITS of them read at once."""
    lane = gl.arange(0, SPLITS, gl.SliceLayout(1, LAYOUT))
    feature = first_feature + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    peak = gl.full([SPLITS], -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    for first in range(0, count, SPLITS):
        at = (slot + first + lane).to(gl.int64) * BLOCK + line
        peak = gl.maximum(peak, gl.load(sums + at, mask=first + lane < count, other=-float("inf")))
    top = gl.max(peak, 0)
    acc = gl.zeros([SPLITS, WIDTH], gl.float32, LAYOUT)
    norm = gl.zeros([SPLITS], gl.float32, gl.SliceLayout(1, LAYOUT))
    for first in range(0, count, SPLITS):
        inside = first + lane < count
        at = (slot + first + lane).to(gl.int64) * BLOCK + line
        share = gl.exp2(gl.load(sums + at, mask=inside, other=-float("inf")) - top)
        where = at[:, None] * LATENT + feature[None, :]
        mask = inside[:, None] & (feature >= 0)[None, :]
        acc += share[:, None] * gl.load(partial + where, mask=mask, other=0.0)
        norm += share
    whole = gl.sum(norm, 0)
    return gl.sum(acc, 0) / gl.where(whole > 0.0, whole, 1.0)


@gluon.jit(do_not_specialize=["rows"])
def mla_combine(
    partial, sums, q_start, kv_len, out, rows, num_ctas,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr, SPLITS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """out[T, H, 512]; grid (T * H * 512 / WIDTH): WIDTH features of a query row each."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    pieces: gl.constexpr = LATENT // WIDTH
    query = gl.program_id(0) // pieces
    first = gl.program_id(0) % pieces * WIDTH
    slot, count, line = partials_of(
        query // HEADS, query % HEADS, q_start, kv_len, rows, num_ctas, HEADS, BLOCK, WARPS
    )
    gdc_wait()
    gdc_launch_dependents()
    y = merge(partial, sums, slot, count, line, first, BLOCK, WIDTH, SPLITS, layout)
    feature = first + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    gl.store(out + query.to(gl.int64) * LATENT + feature, y.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["rows", "num_tokens"])
def mla_combine_up(
    partial, sums, q_start, kv_len, w_uv, out, rows, num_ctas, num_tokens,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, VALUE: gl.constexpr, PIECE: gl.constexpr,
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
        slot, count, line = partials_of(
            token, head, q_start, kv_len, rows, num_ctas, HEADS, BLOCK, WARPS
        )
        y = merge(partial, sums, slot, count, line, 0, BLOCK, LATENT, SPLITS, layout)
        y = gl.convert_layout(y, gl.SliceLayout(0, weights))
        result = gl.sum(w.to(gl.float32) * y[None, :], 1)
        at = (token * HEADS + head).to(gl.int64) * VALUE
        gl.store(out + at + value, result.to(gl.bfloat16))
