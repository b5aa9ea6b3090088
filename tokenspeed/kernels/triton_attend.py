# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention of few query rows over long paged contexts, in Triton. Knows neither op nor layer.

The query rows of a sequence (its query tokens times the heads that share a key) are folded into
blocks of ROWS; the context is cut into spans, so that a few sequences fill the device; a second
kernel merges the spans' results. The products are transposed,

    scores^T [KEYS, ROWS] = K Q^T        out^T [DV, ROWS] = V^T P^T

so that the long sides lie where the matrix units want 64 rows or more, and the rows may be 16.
Only pages that hold keys below kv_len are looked up and read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_launch import (
    num_units,
    pdl_options,
    pdl_release,
    pdl_wait,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_LEAST = tl.constexpr(
    -1.0e30
)  # the running maximum before any key: finite, so that no difference is NaN


@triton.jit
def load_float8(rows, inside, LATENT: tl.constexpr, KEYS: tl.constexpr):
    """Latents [KEYS, LATENT] float32 of float8 rows (`kv_fp8.py`) at pointers [KEYS].

    A code's bits, moved to where float32 has its exponent and mantissa, are the number / 2^120,
    exactly, for all codes but NaN.
    """
    GROUPS: tl.constexpr = LATENT // 128
    feature, group = tl.arange(0, LATENT), tl.arange(0, GROUPS)
    code = tl.load(rows[:, None] + feature[None, :], mask=inside[:, None], other=0).to(tl.uint32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    scales = (rows + LATENT).to(tl.pointer_type(tl.float32))[:, None] + group[None, :]
    scale = tl.load(scales, mask=inside[:, None], other=0.0)
    return tl.reshape(tl.reshape(number, [KEYS, GROUPS, 128]) * scale[:, :, None], [KEYS, LATENT])


@triton.jit
def float8_tail(rows, LATENT: tl.constexpr):
    """Pointers [KEYS] to the features with position of float8 rows."""
    return (rows + (LATENT + LATENT // 128 * 4)).to(tl.pointer_type(tl.bfloat16))


@triton.jit
def load_folded(pointer, places, there, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """SIZE features at each of `places`, zeros up to PADDED and where no row is there."""
    feature = tl.arange(0, PADDED)
    pointers = pointer + places[:, None] + feature[None, :]
    return tl.load(pointers, mask=there[:, None] & (feature < SIZE)[None, :], other=0.0)


@triton.jit
def _row_of(place, q_start, num_rows, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The last row whose blocks begin at or before `place`: row r's at q_start[r] GROUP / ROWS + r.

    Each row has room for all its blocks there. With GROUP = 0, `place` is a token.
    """
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(q_start + middle)
        if GROUP > 0:
            begin = begin * GROUP // ROWS + middle
        low = tl.where(begin <= place, middle, low)
        high = tl.where(begin <= place, high, middle)
    return low


@triton.jit
def block_of(place, q_start, num_rows, blocks, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(row, block within it) of a program: `blocks` for each row, or, if that is 0, as needed."""
    row = place // tl.maximum(blocks, 1)
    block = place - row * blocks
    if blocks == 0:
        row = _row_of(place, q_start, num_rows, GROUP, ROWS)
        block = place - (tl.load(q_start + row) * GROUP // ROWS + row)
    return row, block


# fmt: off
@triton.jit
def page_rows(
    cache, table, start, inside, page_stride, ROW: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr,
):
    # fmt: on
    """Pointers [KEYS] to the cache's rows of positions start + [0, KEYS)."""
    place = tl.arange(0, KEYS)
    if PAGE % KEYS == 0:  # one page, as spans begin at multiples of KEYS
        page = tl.load(table + start // PAGE).to(tl.int64)
        return cache + (page * page_stride + (start % PAGE) * ROW) + place * ROW
    at = start + place
    if MASKED:
        page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
    else:
        page = tl.load(table + at // PAGE).to(tl.int64)
    return cache + page * page_stride + (at % PAGE) * ROW


@triton.jit
def load_rows(pointers, inside, exists, ROWS_MASKED: tl.constexpr, FEATURES_MASKED: tl.constexpr):
    """[rows, features], zeros where one is not there. Without masks where none are needed."""
    if ROWS_MASKED and FEATURES_MASKED:
        return tl.load(pointers, mask=inside[:, None] & exists[None, :], other=0.0)
    if ROWS_MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    if FEATURES_MASKED:
        return tl.load(pointers, mask=exists[None, :], other=0.0)
    return tl.load(pointers)


# fmt: off
@triton.jit
def _attend_keys(
    start, end, position, most, total, sums, query, query_tail, keys, values, table, scale, window,
    key_page, value_page, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
    FLOAT8: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    """Takes keys [start, start + KEYS) into the running (most, total, sums) of [ROWS] rows.

    Keys from `end` on are not there; a row sees keys up to its own `position`.
    """
    at = start + tl.arange(0, KEYS)
    feature, value_feature = tl.arange(0, HEAD), tl.arange(0, VALUE)
    inside = at < end
    rows = page_rows(keys, table, start, inside, key_page, KEY_ROW, PAGE, KEYS, True)
    if FLOAT8:
        key = load_float8(rows, inside, D, KEYS).to(WIDE)
        rows = float8_tail(rows, D)
    else:
        key = load_rows(rows[:, None] + feature[None, :], inside, feature < D, True, D < HEAD)
        key = key.to(WIDE)
        rows += D
    scores = tl.dot(key, tl.trans(query), input_precision="ieee")
    if TAIL > 0:
        further = tl.arange(0, TAIL)
        tail = load_rows(rows[:, None] + further[None, :], inside, further < TAIL, True, False)
        scores = tl.dot(tail.to(WIDE), tl.trans(query_tail), scores, input_precision="ieee")
    seen = (at[:, None] <= position[None, :]) & inside[:, None]
    if WINDOW:
        seen = seen & (at[:, None] > (position - window)[None, :])
    scores = tl.where(seen, scores * scale, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, 0))
    fade = tl.exp2(most - new_most)
    weights = tl.exp2(scores - new_most[None, :])
    total = total * fade + tl.sum(weights, 0)
    if SHARED:
        value = key
    else:
        rows = page_rows(values, table, start, inside, value_page, VALUE_ROW, PAGE, KEYS, True)
        there = rows[:, None] + value_feature[None, :]
        value = load_rows(there, inside, value_feature < DV, True, DV < VALUE).to(WIDE)
    sums = sums * fade[None, :]
    sums = tl.dot(tl.trans(value), weights.to(WIDE), sums, input_precision="ieee")
    return new_most, total, sums


@triton.jit
def _span(low, high, span, spans, window, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """The keys [begin, end) of one span of those that positions low to high see."""
    begin, end = 0, high + 1
    if WINDOW:
        begin = tl.maximum(low - window + 1, 0) // KEYS * KEYS
    each = tl.cdiv(tl.cdiv(end - begin, KEYS), spans) * KEYS
    begin += span * each
    return begin, tl.minimum(begin + each, end)


@triton.jit
def _store(sums, total, out, target, there, DV: tl.constexpr, VALUE: tl.constexpr):
    """sums^T [VALUE, ROWS] / total [ROWS] to places `target` of out [.., DV]; of nothing, zeros."""
    feature = tl.arange(0, VALUE)
    result = sums / tl.where(total == 0.0, 1.0, total)[None, :]
    pointers = out + target[None, :] * DV + feature[:, None]
    mask = there[None, :] & (feature < DV)[:, None]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _attend_block(
    block, first, q_len, length, q, q_tail, keys, values, table, out, lse, scale, num_tokens,
    window, q_token, q_head, tail_token, tail_head, key_page, value_page,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, FLOAT8: tl.constexpr,
    WIDE: tl.constexpr,
):
    # fmt: on
    """The block's results over one span of the keys of one head: its place is the program's."""
    folded = block * ROWS + tl.arange(0, ROWS)
    token, head = first + folded // GROUP, tl.program_id(1) * GROUP + folded % GROUP
    there = folded < q_len * GROUP
    begin, end = _span(
        length - q_len + block * ROWS // GROUP,
        length - q_len + tl.minimum((block * ROWS + ROWS - 1) // GROUP, q_len - 1),
        tl.program_id(2), tl.num_programs(2), window, KEYS, WINDOW,
    )  # fmt: skip
    source = token.to(tl.int64)
    query = load_folded(q, source * q_token + head * q_head, there, D, HEAD).to(WIDE)
    query_tail = query
    if TAIL > 0:
        tails = source * tail_token + head * tail_head
        query_tail = load_folded(q_tail, tails, there, TAIL, TAIL).to(WIDE)
    most = tl.full([ROWS], _LEAST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([VALUE, ROWS], tl.float32)
    position = length - q_len + (block * ROWS + tl.arange(0, ROWS)) // GROUP
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        most, total, sums = _attend_keys(
            start, end, position, most, total, sums, query, query_tail, keys, values, table, scale,
            window, key_page, value_page, KEY_ROW, VALUE_ROW, D, HEAD, TAIL, DV, VALUE, PAGE, KEYS,
            SHARED, WINDOW, FLOAT8, WIDE,
        )  # fmt: skip
    folded = block * ROWS + tl.arange(0, ROWS)
    token, head = first + folded // GROUP, tl.program_id(1) * GROUP + folded % GROUP
    there = folded < q_len * GROUP
    target = token.to(tl.int64) * (tl.num_programs(1) * GROUP) + head
    if SPLIT:
        target += tl.program_id(2).to(tl.int64) * num_tokens * (tl.num_programs(1) * GROUP)
        tl.store(lse + target, most + tl.log2(total), mask=there)
        there = there & (begin < end)
    _store(sums, total, out, target, there, DV, VALUE)


# fmt: off
@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "table_stride", "blocks", "many", "window"]
)
def attend_rows(
    q, q_tail, keys, values, page_table, slots, q_start, kv_len, out, lse, scale, num_rows,
    num_tokens, table_stride, blocks, many, window, q_token, q_head, tail_token, tail_head,
    key_page, key_head, value_page, value_head,
    KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, FLOAT8: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """Blocks of rows, one key head, one span. Grid (programs of all rows, key heads, spans).

    With `blocks` 0, serves rows of `many` queries and more, a program for each block (`block_of`);
    else rows of fewer, each with so many programs, which take its blocks in turn.
    A key is D features (HEAD when padded) and TAIL more; its value DV features, the key's first
    ones if SHARED. With FLOAT8, keys are bytes as `kv_fp8.py` says. `scale` includes log2(e).
    SPLIT: out is float32 [spans, T, H, DV] and lse [spans, T, H], base 2; else out [T, H, DV].
    """
    pdl_wait(PDL)
    row, block = block_of(tl.program_id(0), q_start, num_rows, blocks, GROUP, ROWS)
    first = tl.load(q_start + row)
    q_len = tl.load(q_start + row + 1) - first
    count = tl.cdiv(q_len * GROUP, ROWS)
    if (q_len < many) == (blocks == 0):
        return
    length = tl.load(kv_len + row)
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride
    keys += tl.program_id(1) * key_head
    values += tl.program_id(1) * value_head
    step = tl.where(blocks == 0, count, blocks)
    for at in tl.range(block, count, step, num_stages=1):
        _attend_block(
            at, first, q_len, length, q, q_tail, keys, values, table, out, lse, scale, num_tokens,
            window, q_token, q_head, tail_token, tail_head, key_page, value_page, KEY_ROW,
            VALUE_ROW, GROUP, D, HEAD, TAIL, DV, VALUE, PAGE, ROWS, KEYS, STAGES, SHARED, WINDOW,
            SPLIT, FLOAT8, WIDE,
        )  # fmt: skip
    pdl_release(PDL)


# fmt: off
@triton.jit(do_not_specialize=["num_rows", "num_tokens", "spans", "blocks", "many"])
def combine_spans(
    parts, lse, out, q_start, num_rows, num_tokens, spans, blocks, many,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, SPANS: tl.constexpr,
    SOME: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """parts [spans, T, H, DV], lse [spans, T, H] -> out [T, H, DV]. Grid (T * H, blocks of DV).

    All spans of a block are read at once. SOME: only tokens of the rows that `attend_rows` served.
    """
    place = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(PDL)
    if SOME:
        row = _row_of(tl.program_id(0) // HEADS, q_start, num_rows, 0, 1)
        q_len = tl.load(q_start + row + 1) - tl.load(q_start + row)
        if (q_len < many) == (blocks == 0):
            return
    each = num_tokens.to(tl.int64) * HEADS
    sizes = tl.load(lse + span * each + place, mask=span < spans, other=float("-inf"))
    most = tl.max(sizes, 0)
    weights = tl.exp2(sizes - tl.where(most == float("-inf"), 0.0, most))
    part = tl.load(
        parts + (span * each + place)[:, None] * DV + feature[None, :],
        mask=(sizes > float("-inf"))[:, None] & (feature < DV)[None, :],
        other=0.0,
    )
    pdl_release(PDL)
    total = tl.sum(weights, 0)
    result = tl.sum(part * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + place * DV + feature, result.to(out.dtype.element_ty), mask=feature < DV)


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut: query rows of a block, keys of a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int

    def of_type(self, wide: torch.dtype) -> "Tiles":
        """float32 takes half the keys for the same shared memory."""
        if wide != torch.float32:
            return self
        return replace(self, keys=max(16, self.keys // 2), stages=min(self.stages, 2))


@dataclass(frozen=True)
class Paged:
    """A ragged batch over a paged cache, as `kernels/attention.py` says."""

    page_table: Tensor
    slots: Tensor
    q_start: Tensor
    kv_len: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Part:
    """Rows of a batch that one launch serves: those of `many` query tokens and more, or of fewer.

    `queries`: of how many query tokens most of these rows are thought to be; `alone`: all rows of
    the batch are in this part.
    """

    many: int
    long: bool
    queries: int
    alone: bool


FEW_QUERIES = 8  # a decoding row with its drafts
_ALL = 2**31 - 1


def parts_of(num_tokens: int, num_rows: int, max_q_len: int) -> list[Part]:
    """Cuts a batch into rows of few queries and rows of many, by what the host knows.

    max_q_len 0: unknown. Every row is in one part, whatever q_start says: a wrong guess costs time.
    """
    even = num_tokens // num_rows if num_tokens % num_rows == 0 else num_tokens
    longest = max_q_len or even
    if longest <= FEW_QUERIES:
        return [Part(_ALL, False, longest, True)]
    if num_rows == 1 or longest * num_rows == num_tokens:
        return [Part(0, True, longest, True)]
    others = -(-(num_tokens - longest) // (num_rows - 1))  # on average
    few = min(max(others, 1), FEW_QUERIES)
    return [Part(few + 1, False, few, False), Part(few + 1, True, longest, False)]


def num_spans(programs: int, units: int, most: int = 128) -> int:
    """Into how many spans to cut contexts, so that programs times spans fill the units evenly.

    Depends on no context's length: spans of a short one are empty, and cost next to nothing.
    """
    best, chosen = 0.0, 1
    for spans in range(1, min(most, max(1, 2 * units // programs)) + 1):
        waves = programs * spans / units
        filled = waves / math.ceil(waves)
        if filled > best + 0.05:
            best, chosen = filled, spans
    return chosen


def wide_type(*tensors: Tensor) -> torch.dtype:
    """The type of the products: float32 if operands differ. Bytes stand for any type."""
    kinds = {x.dtype for x in tensors if x.dtype != torch.uint8}
    return kinds.pop() if len(kinds) == 1 else torch.float32


TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def attend_paged(
    q: Tensor,
    q_tail: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Paged,
    scale: float,
    window: int,
    part: Part,
    tiles: Tiles,
    out: Tensor,
) -> None:
    """Fills out[T,H,DV] for the rows of this part.

    q[T,H,D1], q_tail[T,H,D2] (D2 may be 0) over keys [P,page,Hk,D1+D2] and values [P,page,Hk,DV];
    the values are the keys' first features where both are the same memory.
    """
    num_tokens, num_heads, value_dim = out.shape
    group = num_heads // keys.shape[2]
    wide = wide_type(q, keys, values)
    tiles = tiles.of_type(wide)
    blocks = 0 if part.long else -(-part.queries * group // tiles.rows)
    total = batch.num_rows * blocks or num_tokens * group // tiles.rows + batch.num_rows
    spans = num_spans(total * keys.shape[2], num_units(q))
    parts, lse = out, out
    if spans > 1:
        parts = torch.empty(spans, *out.shape, dtype=torch.float32, device=out.device)
        lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=out.device)
    features = (q.shape[2], q_tail.shape[2], value_dim)
    strides = (keys.stride(1), values.stride(1))
    attend_rows[(total, keys.shape[2], spans)](
        q, q_tail, keys, values, batch.page_table, batch.slots, batch.q_start, batch.kv_len,
        parts, lse, scale * math.log2(math.e), batch.num_rows, num_tokens,
        batch.page_table.stride(0), blocks, part.many, window,
        q.stride(0), q.stride(1), q_tail.stride(0), q_tail.stride(1),
        keys.stride(0), keys.stride(2), values.stride(0), values.stride(2),
        **attend_constants(tiles, keys.shape[1], group, features, strides),
        SHARED=values.data_ptr() == keys.data_ptr(), WINDOW=window > 0, SPLIT=spans > 1,
        FLOAT8=keys.dtype == torch.uint8,
        WIDE=TRITON_TYPES[wide], num_warps=tiles.warps, num_stages=tiles.stages, **pdl_options(q),
    )  # fmt: skip
    if spans > 1:
        _combine(parts, lse, out, batch, blocks, part)


def attend_constants(
    tiles: Tiles,
    page_size: int,
    group: int,
    features: tuple[int, int, int],
    strides: tuple[int, int],
) -> dict[str, Any]:
    """Constants of `attend_rows` that follow from shapes; strides of a key's row and a value's."""
    return {
        "KEY_ROW": strides[0],
        "VALUE_ROW": strides[1],
        "PAGE": page_size,
        "GROUP": group,
        **feature_constants(features),
        **tile_constants(tiles),
    }


def feature_constants(features: tuple[int, int, int]) -> dict[str, int]:
    """Sizes of a key's head and tail and of a value, padded to what matrix units take."""
    head, tail, value = features
    if tail & (tail - 1) or 0 < tail < 16:
        raise ValueError(f"attention: {tail} features of the tail are no power of two from 16")
    sizes = {"D": head, "TAIL": tail, "DV": value}
    for name, size in (("HEAD", head), ("VALUE", value)):
        sizes[name] = max(16, triton.next_power_of_2(size))
    return sizes


def tile_constants(tiles: Tiles) -> dict[str, int]:
    return {"ROWS": tiles.rows, "KEYS": tiles.keys, "STAGES": tiles.stages}


_COMBINED = 64  # features that a program of `combine_spans` makes


def _combine(
    parts: Tensor, lse: Tensor, out: Tensor, batch: Paged, blocks: int, part: Part
) -> None:
    spans, num_tokens, num_heads, value_dim = parts.shape
    combine_spans[(num_tokens * num_heads, triton.cdiv(value_dim, _COMBINED))](
        parts,
        lse,
        out,
        batch.q_start,
        batch.num_rows,
        num_tokens,
        spans,
        blocks,
        part.many,
        HEADS=num_heads,
        DV=value_dim,
        BLOCK=_COMBINED,
        SPANS=triton.next_power_of_2(spans),
        SOME=not part.alone,
        num_warps=4,
        **pdl_options(out),
    )


def attend_signature(kind: str, out: str) -> dict[str, str]:
    """Run-time arguments of `attend_rows`, for specimens; `kind` of queries, keys and values."""
    return {
        **dict.fromkeys(("q", "q_tail", "keys", "values"), kind),
        **dict.fromkeys(("page_table", "slots", "q_start", "kv_len"), "*i32"),
        "out": out,
        "lse": "*fp32",
        "scale": "fp32",
        **dict.fromkeys(("num_rows", "num_tokens", "table_stride", "blocks"), "i32"),
        **dict.fromkeys(("many", "window"), "i32"),
        **dict.fromkeys(("q_token", "q_head", "tail_token", "tail_head"), "i32:16"),
        **dict.fromkeys(("key_page", "key_head", "value_page", "value_head"), "i32:16"),
    }


def combine_specimen(arch: str) -> Iterator[Specimen]:
    """As many spans as one sequence gets on a large device."""
    constants, options = specimen_pdl(arch)
    integers = ("num_rows", "num_tokens", "spans", "blocks", "many")
    yield Specimen(
        "combine 128 spans",
        combine_spans,
        {"parts": "*fp32", "lse": "*fp32", "out": "*bf16", "q_start": "*i32"}
        | dict.fromkeys(integers, "i32"),
        {"HEADS": 16, "DV": 512, "BLOCK": _COMBINED, "SPANS": 128, "SOME": False, **constants},
        options=options,
    )
