# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Latent attention over bfloat16 pages on sm_90: a producer warp, transposed products, split keys.

A persistent CTA walks its units (`mla_schedule_gluon.py`). The producer copies tiles of 64 keys by
TMA into a ring; the consumers compute S^T = K Q^T and O^T += V^T P^T, so that the keys are the rows
of the matrix instruction and 16 query rows need no padding to 64. Query rows are tokens x heads.
Results are partial: normalised rows and their log2 sums, in float32, for `mla_combine_gluon.py`.
Refuses to know who merges partials, and float8 pages (`mla_decode_fp8_gluon.py`).
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

from tokenspeed.kernels.mla_schedule_gluon import (
    TILE,
    blocks_and_tiles,
    locate,
    next_block,
    start_of,
    strip_of,
    visible_tiles,
)

LATENT = gl.constexpr(512)
ROPE = gl.constexpr(64)
barrier = (
    gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
)  # 3.6 and 3.7 of Triton


@gluon.jit
def block_of_strip(
    work, tables, unit, strip, block, tile,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """(first query token, queries, tokens, reach, blocks, units, first and last tile) of one block.

    Tiles count from the sequence's begin here. Query i sees the keys below reach + i + 1.
    """
    first, queries, first_tile, tokens, free = strip_of(tables, strip, True, SHARED)
    blocks, tiles = blocks_and_tiles(queries, first_tile, tokens, HEADS, BLOCK)
    stop = gl.minimum(tile + work[1] - unit, tiles)
    seen = visible_tiles(block, queries, first_tile, tokens, free, HEADS, BLOCK)
    span = (first_tile + tile, first_tile + gl.minimum(stop, seen))
    return first, queries, tokens, tokens - queries + free, blocks, stop - tile, span


@gluon.jit
def page_row(pages, slot, tile, PAGE: gl.constexpr):
    """The row of the flattened cache where a tile begins."""
    page = gl.load(pages[0] + slot.to(gl.int64) * pages[2] + tile * TILE // PAGE)
    return page * PAGE + tile * TILE % PAGE


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next place; the phase turns with each round."""
    wrap = stage + 1 == STAGES
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _produce(
    work, tables, pages, latents, ropes, latent_ring, rope_ring, full, empty,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    unit, strip, block, tile, item = start_of(work, tables, SHARED, HEADS, BLOCK)
    stage, phase = 0, 1
    while unit < work[1]:
        _, _, _, _, blocks, count, span = block_of_strip(
            work, tables, unit, strip, block, tile, SHARED, HEADS, BLOCK
        )
        slot = gl.load(pages[1] + strip // (SHARED + 1))
        for t in range(span[0], span[1]):
            at = page_row(pages, slot, t, PAGE)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), latents.block_type.nbytes + ropes.block_type.nbytes)
            tma.async_copy_global_to_shared(
                latents, [at, 0], full.index(stage), latent_ring.index(stage)
            )
            tma.async_copy_global_to_shared(
                ropes, [at, LATENT], full.index(stage), rope_ring.index(stage)
            )
            stage, phase = next_stage(stage, phase, STAGES)
        unit, strip, block, tile, item = next_block(unit, strip, block, item, count, blocks)


@gluon.jit
def load_query(
    source, shared, first, block, num_rows, token_stride, head_stride, factor: gl.constexpr,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A block of query rows times a power of two to shared memory, zeros past the row's end."""
    width: gl.constexpr = shared.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    at = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    column = gl.arange(0, width, gl.SliceLayout(0, layout))
    start = (first + at // HEADS).to(gl.int64) * token_stride + at % HEADS * head_stride
    inside = (at < num_rows)[:, None] & (column >= 0)[None, :]
    value = gl.load(source + start[:, None] + column[None, :], mask=inside, other=0.0)
    shared.store((value.to(gl.float32) * factor).to(gl.bfloat16))


@gluon.jit
def zero_tail(latent, keys, WARPS: gl.constexpr):
    """Rows from `keys` on become zero: what stands there may be NaN, and 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    for part in gl.static_range(LATENT // 64):
        piece = latent.slice(part * 64, 64, dim=1)
        value = piece.load(layout)
        piece.store(gl.where((row < keys)[:, None], value, 0.0))
    fence_async_shared()
    barrier()


@gluon.jit
def softmax_step(scores, seen, peak, norms):
    """(p, peak, norms, decay) of the online softmax down the keys; scores are in log2 units.

    Sums stay one per place of a tile until the end: a sum down the keys costs two barriers.
    """
    scores = gl.where(seen, scores, -float("inf"))
    higher = gl.maximum(peak, gl.max(scores, 0))
    base = gl.where(higher == -float("inf"), 0.0, higher)
    decay = gl.exp2(peak - base)
    p = gl.exp2(scores - base[None, :])
    return p, higher, norms * decay[None, :] + p, decay


@gluon.jit
def store_partial(
    outputs, slot, acc, peak, norm, num_rows, LAYOUT: gl.constexpr, BLOCK: gl.constexpr
):
    """One pair's rows and log2 sums; a row that saw nothing is 0 with -inf."""
    out = acc / gl.where(norm > 0.0, norm, 1.0)[None, :]
    at = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    feature = gl.arange(0, LATENT, gl.SliceLayout(1, LAYOUT))
    base = slot.to(gl.int64) * BLOCK
    place = (base + at)[None, :] * LATENT + feature[:, None]
    gl.store(outputs[0] + place, out, mask=(at < num_rows)[None, :] & (feature >= 0)[:, None])
    gl.store(outputs[1] + base + at, peak + gl.log2(norm), mask=at < num_rows)


@gluon.jit
def _attend(
    span, seen, tokens, scale, query, shared, full, empty, stage, phase,
    LAYOUT: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The tiles of a span under a block: (acc [512, BLOCK], peak, norm, stage, phase)."""
    latent_ring, rope_ring, weights = shared
    peak = gl.full([BLOCK], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    norms = gl.zeros([TILE, BLOCK], gl.float32, LAYOUT)
    acc = gl.zeros([LATENT, BLOCK], gl.float32, LAYOUT)
    key = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    for t in range(span[0], span[1]):
        mbarrier.wait(full.index(stage), phase)
        latent = latent_ring.index(stage)
        if tokens - t * TILE < TILE:
            zero_tail(latent, tokens - t * TILE, WARPS)
        scores = gl.zeros([TILE, BLOCK], gl.float32, LAYOUT)
        scores = warpgroup_mma(
            latent, query[0].permute([1, 0]), scores, use_acc=False, is_async=True
        )
        scores = warpgroup_mma(
            rope_ring.index(stage), query[1].permute([1, 0]), scores, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        below = (t * TILE + key)[:, None] < seen[None, :]
        p, peak, norms, decay = softmax_step(scores * scale, below, peak, norms)
        weights.store(p.to(gl.bfloat16))
        fence_async_shared()
        acc = acc * decay[None, :]
        barrier()
        acc = warpgroup_mma(latent.permute([1, 0]), weights, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, peak, gl.sum(norms, 0), stage, phase


@gluon.jit
def _consume(
    work, tables, scale, queries_at, outputs, query, shared, full, empty,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, WARPS // 4], instr_shape=[16, BLOCK * 4 // WARPS, 16]
    )
    latents, ropes, strides = queries_at
    unit, strip, block, tile, item = start_of(work, tables, SHARED, HEADS, BLOCK)
    stage, phase = 0, 0
    while unit < work[1]:
        first, queries, tokens, reach, blocks, count, span = block_of_strip(
            work, tables, unit, strip, block, tile, SHARED, HEADS, BLOCK
        )
        if count > 0:
            rows = queries * HEADS
            load_query(
                latents,
                query[0],
                first,
                block,
                rows,
                strides[0],
                strides[1],
                1.0,
                HEADS,
                BLOCK,
                WARPS,
            )
            load_query(
                ropes,
                query[1],
                first,
                block,
                rows,
                strides[2],
                strides[3],
                1.0,
                HEADS,
                BLOCK,
                WARPS,
            )
            fence_async_shared()
            barrier()
            at = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
            seen = gl.minimum(reach + at // HEADS + 1, tokens)
            acc, peak, norm, stage, phase = _attend(
                span, seen, tokens, scale, query, shared, full, empty, stage, phase,
                layout, BLOCK, STAGES, WARPS,
            )  # fmt: skip
            place = gl.program_id(0) + item
            store_partial(outputs, place, acc, peak, norm, rows - block * BLOCK, layout, BLOCK)
        unit, strip, block, tile, item = next_block(unit, strip, block, item, count, blocks)


@gluon.jit(do_not_specialize=["rows", "table_stride"])
def mla_decode(
    latents, ropes, q_latent, q_pe, page_table, slots, q_start, kv_len, groups, out, lse,
    rows, scale, table_stride, q_token, q_head, pe_token, pe_head,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """The kernel: descriptors of the cache's two parts, ragged queries, out [slots, BLOCK, 512]."""
    tables = (q_start, kv_len, groups)
    pages = (page_table, slots, table_stride)
    if SHARED:  # the kernel ahead may be the one that found the groups
        gdc_wait()
    work = locate(tables, rows * (SHARED + 1), SHARED, HEADS, BLOCK, WARPS)
    latent_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, LATENT], latents.layout)
    rope_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, ROPE], ropes.layout)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, LATENT], gl.bfloat16)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK], gl.bfloat16)
    query = (
        gl.allocate_shared_memory(gl.bfloat16, [BLOCK, LATENT], wide),
        gl.allocate_shared_memory(gl.bfloat16, [BLOCK, ROPE], wide),
    )
    weights = gl.allocate_shared_memory(gl.bfloat16, [TILE, BLOCK], narrow)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gdc_wait()
    gdc_launch_dependents()
    queries_at = (q_latent, q_pe, (q_token, q_head, pe_token, pe_head))
    gl.warp_specialize(
        [
            (_consume, (work, tables, scale, queries_at, (out, lse), query,
                        (latent_ring, rope_ring, weights), full, empty,
                        SHARED, HEADS, BLOCK, STAGES, WARPS)),
            (_produce, (work, tables, pages, latents, ropes, latent_ring, rope_ring, full, empty,
                        SHARED, HEADS, BLOCK, STAGES, PAGE)),
        ],
        [1],
        [24],
    )  # fmt: skip
