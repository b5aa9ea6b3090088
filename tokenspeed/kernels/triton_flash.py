# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention of many query rows, over keys in line or paged, in Triton. Knows neither op nor layer.

The query tokens of a sequence, times the heads that share a key, are folded into blocks of ROWS;
a program takes a block over all the keys it sees, with running maxima and sums (arXiv:2205.14135).
Keys that the whole block sees are taken without masks. The blocks with the most keys start first.
"""

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_attend import (
    TRITON_TYPES,
    Tiles,
    block_of,
    feature_constants,
    load_folded,
    load_rows,
    page_rows,
    tile_constants,
    wide_type,
)
from tokenspeed.kernels.triton_launch import pdl_options, pdl_release, pdl_wait

_LEAST = tl.constexpr(-1.0e30)  # the running maximum before any key: no difference is NaN


# fmt: off
@triton.jit
def _key_rows(
    cache, table, start, length, page_stride,
    ROW: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):
    # fmt: on
    """Pointers [KEYS] to keys start + [0, KEYS): paged, or, with PAGE = 0, in line."""
    if PAGE == 0:
        return cache + (start + tl.arange(0, KEYS)).to(tl.int64) * ROW
    inside = start + tl.arange(0, KEYS) < length
    return page_rows(cache, table, start, inside, page_stride, ROW, PAGE, KEYS, MASKED)


# fmt: off
@triton.jit
def _take_keys(
    start, end, position, most, total, sums, query, query_tail,
    keys, key_tail, values, table, scale, window, key_page, tail_page, value_page,
    KEY_ROW: tl.constexpr, TAIL_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    VALUE: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    """Takes keys [start, start + KEYS) into the running (most, total, sums) of [ROWS] rows.

    MASKED: keys from `end` on are not there, and a row sees keys by its `position`.
    """
    at = start + tl.arange(0, KEYS)
    inside = at < end
    feature, value_feature = tl.arange(0, HEAD), tl.arange(0, VALUE)
    rows = _key_rows(keys, table, start, end, key_page, KEY_ROW, PAGE, KEYS, MASKED)
    key = load_rows(rows[:, None] + feature[None, :], inside, feature < D, MASKED, D < HEAD)
    scores = tl.dot(query, tl.trans(key.to(WIDE)), input_precision="ieee")
    if TAIL > 0:
        further = tl.arange(0, TAIL)
        rows = _key_rows(key_tail, table, start, end, tail_page, TAIL_ROW, PAGE, KEYS, MASKED)
        tail = load_rows(rows[:, None] + further[None, :], inside, further < TAIL, MASKED, False)
        scores = tl.dot(query_tail, tl.trans(tail.to(WIDE)), scores, input_precision="ieee")
    rows = _key_rows(values, table, start, end, value_page, VALUE_ROW, PAGE, KEYS, MASKED)
    value = load_rows(
        rows[:, None] + value_feature[None, :], inside, value_feature < DV, MASKED, DV < VALUE
    )
    scores = scores * scale
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (at[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (at[None, :] > (position - window)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, 1))
    fade = tl.exp2(most - new_most)
    weights = tl.exp2(scores - new_most[:, None])
    total = total * fade + tl.sum(weights, 1)
    sums = sums * fade[:, None]
    sums = tl.dot(weights.to(WIDE), value.to(WIDE), sums, input_precision="ieee")
    return new_most, total, sums


@triton.jit
def _seen_by_all(first, last, length, window, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that positions first to last see: from [begin, end), all of them [plain, end_plain)."""
    end = tl.minimum(last + 1, length)
    end_plain = tl.minimum(first + 1, length) // KEYS * KEYS
    begin = 0
    plain = 0
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        plain = tl.cdiv(tl.maximum(last - window + 1, 0), KEYS) * KEYS
    plain = tl.minimum(plain, tl.cdiv(end, KEYS) * KEYS)
    return begin, plain, tl.maximum(end_plain, plain), end


@triton.jit
def _store(sums, total, out, target, there, DV: tl.constexpr, VALUE: tl.constexpr):
    """sums [ROWS, VALUE] / total [ROWS] to places `target` of out [.., DV]; of nothing, zeros."""
    feature = tl.arange(0, VALUE)
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    pointers = out + target[:, None] * DV + feature[None, :]
    mask = there[:, None] & (feature < DV)[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit(do_not_specialize=["num_rows", "table_stride", "min_q_len", "window"])
def flash_rows(
    q, q_tail, keys, key_tail, values, page_table, slots, q_start, key_bounds, out, lse,
    scale, num_rows, table_stride, min_q_len, window, q_token, q_head, tail_token, tail_head,
    key_page, key_head, tail_page, tail_key_head, value_page, value_head,
    KEY_ROW: tl.constexpr, TAIL_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    DV: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    LSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """One block of rows and one key head. Grid (blocks of all rows, key heads).

    A key is D features, HEAD when padded, and TAIL more from `key_tail`. key_bounds: kv_len [R] of
    paged keys, k_start [R + 1] of those in line. out [T, H, DV], lse [T, H] (natural) if LSE.
    Rows of fewer than min_q_len queries are left alone. `scale` includes log2(e).
    """
    kv_head, heads = tl.program_id(1), tl.num_programs(1) * GROUP
    pdl_wait(PDL)
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    row, block = block_of(place, q_start, num_rows, 0, GROUP, ROWS)
    first = tl.load(q_start + row)
    q_len = tl.load(q_start + row + 1) - first
    if (q_len < min_q_len) | (block * ROWS >= q_len * GROUP):
        return
    length = tl.load(key_bounds + row)
    table = page_table
    if PAGE == 0:
        keys += length.to(tl.int64) * KEY_ROW
        key_tail += length.to(tl.int64) * TAIL_ROW
        values += length.to(tl.int64) * VALUE_ROW
        length = tl.load(key_bounds + row + 1) - length
    else:
        table += tl.load(slots + row).to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * key_head
    key_tail += kv_head.to(tl.int64) * tail_key_head
    values += kv_head.to(tl.int64) * value_head
    token = (block * ROWS + tl.arange(0, ROWS)) // GROUP
    head = kv_head * GROUP + (block * ROWS + tl.arange(0, ROWS)) % GROUP
    there = token < q_len
    source = (first + token).to(tl.int64)
    query = load_folded(q, source * q_token + head * q_head, there, D, HEAD).to(WIDE)
    query_tail = query
    if TAIL > 0:
        tails = source * tail_token + head * tail_head
        query_tail = load_folded(q_tail, tails, there, TAIL, TAIL).to(WIDE)
    most, total = tl.full([ROWS], _LEAST, tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE], tl.float32)
    position = length - q_len + token
    final = tl.minimum((block * ROWS + ROWS - 1) // GROUP, q_len - 1)
    begin, plain, end_plain, end = _seen_by_all(
        length - q_len + block * ROWS // GROUP if CAUSAL else length,
        length - q_len + final if CAUSAL else length,
        length, window, KEYS, WINDOW,
    )  # fmt: skip
    for part in tl.static_range(3):
        if part != 0 or WINDOW:
            low = begin if part == 0 else (plain if part == 1 else end_plain)
            high = plain if part == 0 else (end_plain if part == 1 else end)
            for start in tl.range(low, high, KEYS, num_stages=STAGES):
                most, total, sums = _take_keys(
                    start, end, position, most, total, sums, query, query_tail, keys, key_tail,
                    values, table, scale, window, key_page, tail_page, value_page, KEY_ROW,
                    TAIL_ROW, VALUE_ROW, D, HEAD, TAIL, DV, VALUE, PAGE, KEYS, part != 1, CAUSAL,
                    WINDOW, WIDE,
                )  # fmt: skip
    pdl_release(PDL)
    target = source * heads + head
    _store(sums, total, out, target, there, DV, VALUE)
    if LSE:
        tl.store(lse + target, (most + tl.log2(total)) * 0.6931471805599453, mask=there)


@dataclass(frozen=True)
class Keys:
    """Keys and values in pages [P, page, Hk, features] or in line [S, Hk, features].

    `tails` are further features of the keys; [S, 1, R] are shared by all heads. `bounds`: kv_len
    [R] of paged keys, k_start [R + 1] of those in line, which have no `page_table` and `slots`.
    """

    keys: Tensor
    tails: Tensor
    values: Tensor
    bounds: Tensor
    page_table: Tensor | None = None
    slots: Tensor | None = None

    @property
    def page_size(self) -> int:
        return 0 if self.page_table is None else self.keys.shape[1]

    def page_strides(self) -> tuple[int, ...]:
        """Of pages and heads: keys, tails, values."""
        paged = self.page_size > 0
        strides = []
        for x in (self.keys, self.tails, self.values):
            strides += [x.stride(0) if paged else 0, x.stride(-2) if x.shape[-2] > 1 else 0]
        return tuple(strides)

    def row_strides(self) -> tuple[int, ...]:
        return tuple(x.stride(-3) for x in (self.keys, self.tails, self.values))


def flash(
    q: Tensor,
    q_tail: Tensor,
    keys: Keys,
    q_start: Tensor,
    scale: float,
    tiles: Tiles,
    out: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    window: int = 0,
    min_q_len: int = 1,
) -> None:
    """Fills out[T,H,DV] and lse[T,H] for q[T,H,D] with q_tail[T,H,R] (R may be 0) over keys.

    Serves rows of min_q_len query tokens and more.
    """
    wide = wide_type(q, keys.keys, keys.values)
    tiles = tiles.of_type(wide)
    group, kv_heads = q.shape[1] // keys.keys.shape[-2], keys.keys.shape[-2]
    num_rows = len(q_start) - 1
    features = (q.shape[2], q_tail.shape[2], out.shape[2])
    flash_rows[(q.shape[0] * group // tiles.rows + num_rows, kv_heads)](
        q, q_tail, keys.keys, keys.tails, keys.values,
        keys.bounds if keys.page_table is None else keys.page_table,
        keys.bounds if keys.slots is None else keys.slots,
        q_start, keys.bounds, out, out if lse is None else lse,
        scale * math.log2(math.e), num_rows,
        0 if keys.page_table is None else keys.page_table.stride(0),
        min_q_len, window, q.stride(0), q.stride(1), q_tail.stride(0), q_tail.stride(1),
        *keys.page_strides(),
        **flash_constants(tiles, keys.page_size, group, features, keys.row_strides()),
        CAUSAL=causal, WINDOW=window > 0, LSE=lse is not None, WIDE=TRITON_TYPES[wide],
        num_warps=tiles.warps, num_stages=tiles.stages, **pdl_options(q),
    )  # fmt: skip


def flash_constants(
    tiles: Tiles,
    page_size: int,
    group: int,
    features: tuple[int, int, int],
    strides: tuple[int, ...],
) -> dict[str, Any]:
    """Constants of `flash_rows` that follow from shapes; features, strides: head, tail, value."""
    return {
        "KEY_ROW": strides[0],
        "TAIL_ROW": strides[1],
        "VALUE_ROW": strides[2],
        "PAGE": page_size,
        "GROUP": group,
        **feature_constants(features),
        **tile_constants(tiles),
    }


def flash_signature(kind: str) -> dict[str, str]:
    """Run-time arguments of `flash_rows`, for specimens; `kind` of all but lse."""
    return {
        **dict.fromkeys(("q", "q_tail", "keys", "key_tail", "values", "out"), kind),
        **dict.fromkeys(("page_table", "slots", "q_start", "key_bounds"), "*i32"),
        "lse": "*fp32",
        "scale": "fp32",
        **dict.fromkeys(("num_rows", "table_stride", "min_q_len", "window"), "i32"),
        **dict.fromkeys(("q_token", "q_head", "tail_token", "tail_head"), "i32:16"),
        **dict.fromkeys(("key_page", "key_head", "tail_page", "tail_key_head"), "i32:16"),
        **dict.fromkeys(("value_page", "value_head"), "i32:16"),
    }
