# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention over keys in line on sm_90, heads of 128 + 64 features for keys and 128 for values.

A CTA has 128 queries of one head: two warp groups of 64 queries each, and a producer warp that
copies tiles of 64 keys and values by TMA into a ring of four. A group multiplies the next tile's
scores while the last tile's values are still being summed, and only the ring holds both groups
together. Refuses to know pages and how keys were made.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.mla_decode_gluon import barrier, next_stage

HEAD = gl.constexpr(128)
TAIL = gl.constexpr(64)
KEYS = gl.constexpr(64)  # of a tile
GROUP = gl.constexpr(64)  # queries of a warp group
STAGES = gl.constexpr(4)
CHUNK = gl.constexpr(256)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def block_at(q_start, rows, index):
    """(row, block) of the index-th block of 128 queries; row is `rows` behind the last one."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    row, before, seen = 0, 0, 0
    for first in range(0, rows, CHUNK):
        at = first + gl.arange(0, CHUNK, layout)
        inside = at < rows
        start = gl.load(q_start + at, mask=inside, other=0)
        queries = gl.load(q_start + at + 1, mask=inside, other=0) - start
        blocks = (queries + 2 * GROUP - 1) // (2 * GROUP)
        past = (gl.associative_scan(blocks, 0, _plus) + seen <= index) & inside
        row += gl.sum(past.to(gl.int32), 0)
        before += gl.sum(gl.where(past, blocks, 0), 0)
        seen += gl.sum(blocks, 0)
    return row, index - before


@gluon.jit
def _produce(work, queries, keys, query, ring, ready, full, empty):
    first_query, first_key, tiles, q_columns, k_columns = work
    q_head, q_tail = queries
    k_head, k_tail, values = keys
    if tiles > 0:
        size: gl.constexpr = q_head.block_type.nbytes + q_tail.block_type.nbytes
        mbarrier.expect(ready, 2 * size)
        for part in gl.static_range(2):
            at = first_query + part * GROUP
            tma.async_copy_global_to_shared(q_head, [at, q_columns[0]], ready, query[0].index(part))
            tma.async_copy_global_to_shared(q_tail, [at, q_columns[1]], ready, query[1].index(part))
    stage, phase = 0, 1
    for t in range(tiles):
        at = first_key + t * KEYS
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full[0].index(stage), k_head.block_type.nbytes + k_tail.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_head, [at, k_columns[0]], full[0].index(stage), ring[0].index(stage)
        )
        tma.async_copy_global_to_shared(k_tail, [at, 0], full[0].index(stage), ring[1].index(stage))
        mbarrier.expect(full[1].index(stage), values.block_type.nbytes)
        tma.async_copy_global_to_shared(
            values, [at, k_columns[1]], full[1].index(stage), ring[2].index(stage)
        )
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _zero_rows(values, count):
    """Rows of a tile of values from `count` on become zero: 0 * NaN of another request is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    for part in gl.static_range(2):
        piece = values.slice(part * 64, 64, dim=1)
        piece.store(gl.where((row < count)[:, None], piece.load(layout), 0.0))
    fence_async_shared()
    barrier()


@gluon.jit
def _scores(head, tail, keys, tails, LAYOUT: gl.constexpr):
    """[GROUP, KEYS], in flight."""
    scores = gl.zeros([GROUP, KEYS], gl.float32, LAYOUT)
    scores = warpgroup_mma(head, keys.permute([1, 0]), scores, use_acc=False, is_async=True)
    return warpgroup_mma(tail, tails.permute([1, 0]), scores, is_async=True)


@gluon.jit
def _softmax(scores, t, seen, peak, norm, scale, LAYOUT: gl.constexpr):
    """(p, peak, norm, decay) along the keys of tile t."""
    key = t * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    scores = gl.where(key[None, :] < seen[:, None], scores * scale, -float("inf"))
    higher = gl.maximum(peak, gl.max(scores, 1))
    base = gl.where(higher == -float("inf"), 0.0, higher)
    decay = gl.exp2(peak - base)
    p = gl.exp2(scores - base[:, None])
    return p, higher, norm * decay + gl.sum(p, 1), decay


@gluon.jit
def _values(p, values, acc, keys_left, LAYOUT: gl.constexpr):
    """acc + p values, in flight; the tile has `keys_left` keys of this row."""
    if keys_left < KEYS:
        _zero_rows(values, keys_left)
    weights = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, LAYOUT, 2))
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def _consume(
    part: gl.constexpr, work, limits, scale, outputs, query, ring, ready, full, empty,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16]
    )
    wide: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD, 16]
    )
    tiles = work[2]
    num_queries, first, num_keys = limits
    at = first + part * GROUP + gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    seen = num_keys + at * 0
    if CAUSAL:
        seen = gl.minimum(num_keys - num_queries + at + 1, num_keys)
    peak = gl.full([GROUP], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    norm = gl.full([GROUP], 0.0, gl.float32, gl.SliceLayout(1, layout))
    acc = gl.zeros([GROUP, HEAD], gl.float32, wide)
    if tiles > 0:
        head, tail = query[0].index(part), query[1].index(part)
        mbarrier.wait(ready, 0)
        mbarrier.wait(full[0].index(0), 0)
        scores = _scores(head, tail, ring[0].index(0), ring[1].index(0), layout)
        scores = warpgroup_mma_wait(0, deps=[scores])
        p, peak, norm, decay = _softmax(scores, 0, seen, peak, norm, scale, layout)
        stage, phase = 0, 0
        for t in range(1, tiles):
            ahead, turn = next_stage(stage, phase, STAGES)
            mbarrier.wait(full[0].index(ahead), turn)
            scores = _scores(head, tail, ring[0].index(ahead), ring[1].index(ahead), layout)
            mbarrier.wait(full[1].index(stage), phase)
            acc = _values(p, ring[2].index(stage), acc, KEYS, wide)
            scores = warpgroup_mma_wait(1, deps=[scores])
            p, peak, norm, decay = _softmax(scores, t, seen, peak, norm, scale, layout)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, wide))[:, None]
            stage, phase = ahead, turn
        mbarrier.wait(full[1].index(stage), phase)
        acc = _values(p, ring[2].index(stage), acc, num_keys - (tiles - 1) * KEYS, wide)
        acc = warpgroup_mma_wait(0, deps=[acc])
    peak = gl.convert_layout(peak, gl.SliceLayout(1, wide))
    norm = gl.convert_layout(norm, gl.SliceLayout(1, wide))
    at = first + part * GROUP + gl.arange(0, GROUP, gl.SliceLayout(1, wide))
    _store(outputs, acc, peak, norm, at, num_queries, wide)


@gluon.jit
def _store(outputs, acc, peak, norm, at, num_queries, LAYOUT: gl.constexpr):
    """Rows and natural logarithms of sums; a query that saw nothing gives 0 and -inf."""
    out, lse, first_query, head, heads = outputs
    feature = gl.arange(0, HEAD, gl.SliceLayout(0, LAYOUT))
    row = (first_query + at).to(gl.int64) * heads + head
    inside = at < num_queries
    value = acc / gl.where(norm > 0.0, norm, 1.0)[:, None]
    mask = inside[:, None] & (feature >= 0)[None, :]
    gl.store(out + row[:, None] * HEAD + feature[None, :], value.to(gl.bfloat16), mask=mask)
    gl.store(lse + row, (peak + gl.log2(norm)) * LN2, mask=inside)


@gluon.jit
def _shared_memory(q_head, q_tail, k_head, k_tail, values):
    """(queries, ring, ready, full, empty): places of both groups' queries and of the tiles."""
    query = (
        gl.allocate_shared_memory(gl.bfloat16, [2, GROUP, HEAD], q_head.layout),
        gl.allocate_shared_memory(gl.bfloat16, [2, GROUP, TAIL], q_tail.layout),
    )
    ring = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, HEAD], k_head.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, TAIL], k_tail.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, HEAD], values.layout),
    )
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = (
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full[0].index(i), count=1)
        mbarrier.init(full[1].index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return query, ring, ready, full, empty


@gluon.jit(do_not_specialize=["rows"])
def ragged_attend(
    q_head, q_tail, k_head, k_tail, values, q_start, k_start, out, lse,
    rows, heads, scale, q_stride, q_tail_stride, k_stride, v_stride,
    CAUSAL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Descriptors [tokens, columns]; a head's columns begin at head * stride. Grid (blocks, H)."""
    gdc_wait()
    gdc_launch_dependents()
    head = gl.program_id(1)
    row, block = block_at(q_start, rows, gl.num_programs(0) - 1 - gl.program_id(0))
    first_query, num_queries, first_key, num_keys, tiles = 0, 0, 0, 0, 0
    first = block * 2 * GROUP
    if row < rows:
        first_query = gl.load(q_start + row)
        num_queries = gl.load(q_start + row + 1) - first_query
        first_key = gl.load(k_start + row)
        num_keys = gl.load(k_start + row + 1) - first_key
        reach = num_keys
        if CAUSAL:
            last = gl.minimum(first + 2 * GROUP, num_queries)
            reach = gl.maximum(num_keys - num_queries + last, 0)
        tiles = (reach + KEYS - 1) // KEYS
    query, ring, ready, full, empty = _shared_memory(q_head, q_tail, k_head, k_tail, values)
    q_columns, k_columns = (
        (head * q_stride, head * q_tail_stride),
        (head * k_stride, head * v_stride),
    )
    work = (first_query + first, first_key, tiles, q_columns, k_columns)
    limits = (num_queries, first, num_keys)
    outputs = (out, lse, first_query, head, heads)
    gl.warp_specialize(
        [
            (_consume, (0, work, limits, scale, outputs, query, ring, ready, full, empty, CAUSAL)),
            (_consume, (1, work, limits, scale, outputs, query, ring, ready, full, empty, CAUSAL)),
            (
                _produce,
                (work, (q_head, q_tail), (k_head, k_tail, values), query, ring, ready, full, empty),
            ),
        ],
        [4, 1],
        [240, 24],
    )
