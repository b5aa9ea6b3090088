# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Latent attention over float8 pages on sm_90: rows of 656 bytes, widened by moving bits.

A row is 512 e4m3 codes, 4 float32 scales (one for 128 codes), 64 bfloat16 features with position.
Sign, exponent and mantissa of e4m3 moved to their places in bfloat16 make the code times 2^-120,
exactly, for all 254 finite codes. Neither the scales nor 2^120 touch the codes: scores of the four
groups are summed with their scales, and weights are scaled for each group's values; powers of two
in the query and in the weights keep float32 sums far from its smallest numbers. Everything else is
as in `mla_decode_gluon.py`. Refuses to know how rows are quantised (`kv_fp8.py`).
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

from tokenspeed.kernels.mla_decode_gluon import (
    LATENT,
    ROPE,
    barrier,
    block_of_strip,
    load_query,
    next_stage,
    page_row,
    softmax_step,
)
from tokenspeed.kernels.mla_schedule_gluon import TILE, locate, next_block, start_of

GROUP = gl.constexpr(128)  # codes of a scale
GROUPS = gl.constexpr(4)
WORDS = gl.constexpr(32)  # int32 words of a group's codes
LIFT = gl.constexpr(2.0**64)  # in the query and in the weights
REST = gl.constexpr(2.0**56)  # LIFT * REST = 2^120
SCALES_AT = gl.constexpr(128)  # in float32
ROPE_AT = gl.constexpr(264)  # in bfloat16


@gluon.jit
def fresh_zero():
    """A zero that the compiler must make anew in every round of a loop.

    Descriptors of shared memory that do not change with the loop would all be held in registers,
    136 of them, and spill; counted from this zero they are made where they are used.
    """
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _produce(
    work, tables, pages, caches, rings, full, empty,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    codes, scales, ropes = caches
    code_ring, scale_ring, rope_ring = rings
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
            ready = full.index(stage)
            mbarrier.expect(
                ready,
                codes.block_type.nbytes * GROUPS
                + scales.block_type.nbytes
                + ropes.block_type.nbytes,
            )
            for group in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(
                    codes, [at, group * WORDS], ready, code_ring.index(stage * GROUPS + group)
                )
            tma.async_copy_global_to_shared(scales, [at, SCALES_AT], ready, scale_ring.index(stage))
            tma.async_copy_global_to_shared(ropes, [at, ROPE_AT], ready, rope_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        unit, strip, block, tile, item = next_block(unit, strip, block, item, count, blocks)


@gluon.jit
def widened(word):
    """Four e4m3 codes in a word -> two words of bfloat16 pairs, code times 2^-120 each."""
    odd = (word & -0x7FFF8000) | ((word & 0x7F007F00) >> 4)
    word = word << 8
    even = (word & -0x7FFF8000) | ((word & 0x7F007F00) >> 4)
    first = (even & 0xFFFF) | (odd << 16)
    second = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
    return first, second


@gluon.jit
def _widen_tile(codes, first_code, wide, keys, WARPS: gl.constexpr):
    """A tile's codes to bfloat16 in shared memory; rows from `keys` on become zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    words: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    row = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    for group in range(GROUPS):
        target = wide.index(group)._reinterpret(gl.int32, [TILE, 2 * WORDS], words)
        word = codes.index(first_code + group).load(layout)
        first, second = widened(gl.where((row < keys)[:, None], word, 0))
        target.store(gl.join(first, second).reshape([TILE, 2 * WORDS]))
    fence_async_shared()
    barrier()


@gluon.jit
def _scale(ring, group: gl.constexpr, inside, LAYOUT: gl.constexpr):
    """[TILE, 1] scales of one group, zero where there is no key."""
    return gl.where(inside, ring.slice(group, 1, dim=1).load(LAYOUT), 0.0)


@gluon.jit
def _scores(
    wide, rope, scales, query, zero, inside, scale, BLOCK: gl.constexpr, LAYOUT: gl.constexpr
):
    """[TILE, BLOCK] scores in log2 units: the groups' products by their scales, and the rope's."""
    nothing = gl.zeros([TILE, BLOCK], gl.float32, LAYOUT)
    k0, q0 = wide.index(zero), query[0].index(zero).permute([1, 0])
    k1, q1 = wide.index(zero + 1), query[0].index(zero + 1).permute([1, 0])
    k2, q2 = wide.index(zero + 2), query[0].index(zero + 2).permute([1, 0])
    k3, q3 = wide.index(zero + 3), query[0].index(zero + 3).permute([1, 0])
    part0 = warpgroup_mma(k0, q0, nothing, use_acc=False, is_async=True)
    part1 = warpgroup_mma(k1, q1, nothing, use_acc=False, is_async=True)
    part2 = warpgroup_mma(k2, q2, nothing, use_acc=False, is_async=True)
    part3 = warpgroup_mma(k3, q3, nothing, use_acc=False, is_async=True)
    q_rope = query[1].index(zero).permute([1, 0])
    tail = warpgroup_mma(rope, q_rope, nothing, use_acc=False, is_async=True)
    part0, part1, part2, part3, tail = warpgroup_mma_wait(
        0, deps=[part0, part1, part2, part3, tail]
    )
    total = part0 * _scale(scales, 0, inside, LAYOUT) + part1 * _scale(scales, 1, inside, LAYOUT)
    total += part2 * _scale(scales, 2, inside, LAYOUT) + part3 * _scale(scales, 3, inside, LAYOUT)
    return (total * REST + tail) * scale


@gluon.jit
def _attend(
    span, seen, tokens, scale, query, shared, full, empty, stage, phase,
    LAYOUT: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The tiles of a span under a block: (four acc [128, BLOCK], peak, norm, stage, phase)."""
    rings, wide, weights = shared
    code_ring, scale_ring, rope_ring = rings
    peak = gl.full([BLOCK], -float("inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    norms = gl.zeros([TILE, BLOCK], gl.float32, LAYOUT)
    acc0 = gl.zeros([GROUP, BLOCK], gl.float32, LAYOUT)
    acc1 = gl.zeros([GROUP, BLOCK], gl.float32, LAYOUT)
    acc2 = gl.zeros([GROUP, BLOCK], gl.float32, LAYOUT)
    acc3 = gl.zeros([GROUP, BLOCK], gl.float32, LAYOUT)
    key = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    for t in range(span[0], span[1]):
        mbarrier.wait(full.index(stage), phase)
        _widen_tile(code_ring, stage * GROUPS, wide, tokens - t * TILE, WARPS)
        scales = scale_ring.index(stage)
        at = (t * TILE + key)[:, None]
        inside = at < tokens
        rope = rope_ring.index(stage)
        zero = fresh_zero()
        scores = _scores(wide, rope, scales, query, zero, inside, scale, BLOCK, LAYOUT)
        p, peak, norms, decay = softmax_step(scores, at < seen[None, :], peak, norms)
        p = p * LIFT
        for group in gl.static_range(GROUPS):
            scaled = p * _scale(scales, group, inside, LAYOUT)
            weights.index(group).store(scaled.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        decay = decay[None, :]
        v0, p0 = wide.index(zero).permute([1, 0]), weights.index(zero)
        v1, p1 = wide.index(zero + 1).permute([1, 0]), weights.index(zero + 1)
        v2, p2 = wide.index(zero + 2).permute([1, 0]), weights.index(zero + 2)
        v3, p3 = wide.index(zero + 3).permute([1, 0]), weights.index(zero + 3)
        acc0 = warpgroup_mma(v0, p0, acc0 * decay, is_async=True)
        acc1 = warpgroup_mma(v1, p1, acc1 * decay, is_async=True)
        acc2 = warpgroup_mma(v2, p2, acc2 * decay, is_async=True)
        acc3 = warpgroup_mma(v3, p3, acc3 * decay, is_async=True)
        acc0, acc1, acc2, acc3 = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, acc3])
        barrier()
        stage, phase = next_stage(stage, phase, STAGES)
    return (acc0, acc1, acc2, acc3), peak, gl.sum(norms, 0), stage, phase


@gluon.jit
def _store_partial(
    outputs, slot, accs, peak, norm, num_rows, LAYOUT: gl.constexpr, BLOCK: gl.constexpr
):
    at = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    feature = gl.arange(0, GROUP, gl.SliceLayout(1, LAYOUT))
    base = slot.to(gl.int64) * BLOCK
    share = (REST / gl.where(norm > 0.0, norm, 1.0))[None, :]
    place = (base + at)[None, :] * LATENT + feature[:, None]
    mask = (at < num_rows)[None, :] & (feature >= 0)[:, None]
    for group in gl.static_range(GROUPS):
        gl.store(outputs[0] + place + group * GROUP, accs[group] * share, mask=mask)
    gl.store(outputs[1] + base + at, peak + gl.log2(norm), mask=at < num_rows)


@gluon.jit
def _consume(
    work, tables, scale, queries_at, outputs, query, shared, full, empty,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK, 16]
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
            for group in gl.static_range(GROUPS):
                load_query(
                    latents + group * GROUP, query[0].index(group), first, block, rows,
                    strides[0], strides[1], LIFT, HEADS, BLOCK, WARPS,
                )  # fmt: skip
            load_query(
                ropes, query[1].index(0), first, block, rows,
                strides[2], strides[3], 1.0, HEADS, BLOCK, WARPS,
            )  # fmt: skip
            fence_async_shared()
            barrier()
            at = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
            seen = gl.minimum(reach + at // HEADS + 1, tokens)
            accs, peak, norm, stage, phase = _attend(
                span, seen, tokens, scale, query, shared, full, empty, stage, phase,
                layout, BLOCK, STAGES, WARPS,
            )  # fmt: skip
            place = gl.program_id(0) + item
            _store_partial(outputs, place, accs, peak, norm, rows - block * BLOCK, layout, BLOCK)
        unit, strip, block, tile, item = next_block(unit, strip, block, item, count, blocks)


@gluon.jit(do_not_specialize=["rows", "table_stride"])
def mla_decode_fp8(
    codes, scales, ropes, q_latent, q_pe, page_table, slots, q_start, kv_len, groups, out, lse,
    rows, scale, table_stride, q_token, q_head, pe_token, pe_head,
    SHARED: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """As `mla_decode`, with descriptors of the cache's three parts."""
    tables = (q_start, kv_len, groups)
    pages = (page_table, slots, table_stride)
    if SHARED:  # the kernel ahead may be the one that found the groups
        gdc_wait()
    work = locate(tables, rows * (SHARED + 1), SHARED, HEADS, BLOCK, WARPS)
    rings = (
        gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, TILE, WORDS], codes.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, TILE, 4], scales.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, ROPE], ropes.layout),
    )
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, GROUP], gl.bfloat16)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, BLOCK], gl.bfloat16)
    query = (
        gl.allocate_shared_memory(gl.bfloat16, [GROUPS, BLOCK, GROUP], tile),
        gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK, ROPE], tile),
    )
    wide = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, TILE, GROUP], tile)
    weights = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, TILE, BLOCK], narrow)
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
                        (rings, wide, weights), full, empty, SHARED, HEADS, BLOCK, STAGES, WARPS)),
            (_produce, (work, tables, pages, (codes, scales, ropes), rings, full, empty,
                        SHARED, HEADS, BLOCK, STAGES, PAGE)),
        ],
        [1],
        [24],
    )  # fmt: skip
