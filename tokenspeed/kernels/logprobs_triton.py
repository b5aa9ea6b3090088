# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Log-probabilities and penalties in Triton. Knows no sampling rule and no request.

`logprobs` is two launches: chunks of all rows at once, then one program a row that merges them.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels import sample as reference
from tokenspeed.kernels.triton_launch import (
    expect_contiguous,
    expect_rows,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_CHUNK = 2048
_MAX_TOP = 64
_NOBODY = tl.constexpr(2147483647)


@triton.jit
def _take_best(values, ids, free):
    """The largest free value, NaN before all, its lowest id, and what stays free."""
    keys = tl.where(values == values, values, float("inf"))
    top = tl.max(tl.where(free, keys, -float("inf")), 0)
    best = tl.min(tl.where(free & (keys == top), ids, _NOBODY), 0)
    return top, best, free & (ids != best)


@triton.jit
def _scan(
    logits,
    ids,
    tops,
    sums,
    greater,
    best,
    best_ids,
    vocab,
    row_stride,
    k,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, chunk): largest, sum of exponentials, logits above the chosen, k best."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    slot = row * tl.num_programs(1) + chunk
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    pdl_wait(PDL)
    start = logits + row.to(tl.int64) * row_stride
    x = tl.load(start + at, mask=inside, other=-float("inf"))
    chosen = tl.load(start + tl.load(ids + row))
    top = tl.max(x, 0)
    base = tl.where(top > -float("inf"), top, 0.0)
    tl.store(tops + slot, base)
    tl.store(sums + slot, tl.sum(tl.where(inside, tl.exp(x - base), 0.0), 0))
    tl.store(greater + slot, tl.sum((x > chosen).to(tl.int32), 0))
    place = tl.arange(0, K)
    values, tokens = tl.full([K], -float("inf"), tl.float32), tl.full([K], _NOBODY, tl.int32)
    free = inside
    for choice in range(k):
        value, token, free = _take_best(x, at, free)
        values = tl.where(place == choice, value, values)
        tokens = tl.where(place == choice, token, tokens)
    pdl_release(PDL)
    tl.store(best + slot * K + place, values)
    tl.store(best_ids + slot * K + place, tokens)


@triton.jit
def _merge(
    logits,
    ids,
    tops,
    sums,
    greater,
    best,
    best_ids,
    chosen,
    rank,
    top_ids,
    top,
    row_stride,
    chunks,
    k,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program row: the chunks' sums in order, and the k best of their best."""
    row = tl.program_id(0)
    at = tl.arange(0, CHUNKS)
    inside = at < chunks
    slot = row * chunks + at
    pdl_wait(PDL)
    bases = tl.load(tops + slot, mask=inside, other=-float("inf"))
    base = tl.max(bases, 0)
    parts = tl.load(sums + slot, mask=inside, other=0.0) * tl.exp(bases - base)
    total = base + tl.log(tl.sum(parts, 0))
    mine = tl.load(logits + row.to(tl.int64) * row_stride + tl.load(ids + row))
    tl.store(chosen + row, mine - total)
    above = tl.sum(tl.load(greater + slot, mask=inside, other=0), 0)
    tl.store(rank + row, (above + 1).to(tl.int64))
    place = tl.arange(0, CHUNKS * K)
    listed = place < chunks * K
    values = tl.load(best + row * chunks * K + place, mask=listed, other=-float("inf"))
    tokens = tl.load(best_ids + row * chunks * K + place, mask=listed, other=_NOBODY)
    free = tokens < _NOBODY
    pdl_release(PDL)
    for choice in range(k):
        value, token, free = _take_best(values, tokens, free)
        tl.store(top + row * k + choice, value - total)
        tl.store(top_ids + row * k + choice, token.to(tl.int64))


@triton.jit
def _penalise(
    logits,
    slots,
    prompt_seen,
    output_count,
    repetition,
    presence,
    frequency,
    vocab,
    row_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, block of tokens), in place; nothing is touched at 1, 0, 0."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(PDL)
    divisor = tl.load(repetition + row)
    once, each = tl.load(presence + row), tl.load(frequency + row)
    plain = (divisor == 1.0) & (once == 0.0) & (each == 0.0)
    mask = at < tl.where(plain, 0, vocab)
    history = tl.load(slots + row).to(tl.int64) * vocab
    x = tl.load(logits + row.to(tl.int64) * row_stride + at, mask=mask, other=0.0)
    seen = tl.load(prompt_seen + history + at, mask=mask, other=0) != 0
    count = tl.load(output_count + history + at, mask=mask, other=0)
    turned = tl.where(x > 0.0, tl.div_rn(x, divisor), x * divisor)
    x = tl.where(seen | (count > 0), turned, x)
    x -= each * count.to(tl.float32) + tl.where(count > 0, once, 0.0)
    pdl_release(PDL)
    tl.store(logits + row.to(tl.int64) * row_stride + at, x, mask=mask)


def logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits[B,V] float32, ids[B] int64 -> (chosen[B], rank[B], top_ids[B,k], top[B,k]).

    At equal logits the lower id comes first. k above 64 is the reference's.
    """
    expect_rows("logprobs", logits=logits)
    rows, vocab = logits.shape
    if not 0 <= k <= vocab:
        raise ValueError(f"logprobs: k is {k}, of {vocab} tokens")
    if k > _MAX_TOP:
        return reference.logprobs(logits, ids, k)
    device, chunks = logits.device, triton.cdiv(vocab, _CHUNK)
    width = triton.next_power_of_2(max(k, 1))
    floats, whole = (torch.float32, torch.int32)
    chosen, top = (torch.empty(s, dtype=floats, device=device) for s in ((rows,), (rows, k)))
    rank, top_ids = (torch.empty(s, dtype=torch.int64, device=device) for s in ((rows,), (rows, k)))
    if rows == 0:
        return chosen, rank, top_ids, top
    tops, sums = torch.empty((2, rows, chunks), dtype=floats, device=device)
    greater = torch.empty((rows, chunks), dtype=whole, device=device)
    best = torch.empty((rows, chunks, width), dtype=floats, device=device)
    best_ids = torch.empty((rows, chunks, width), dtype=whole, device=device)
    found, pdl = (tops, sums, greater, best, best_ids), pdl_options(logits)
    _scan[(rows, chunks)](
        *(logits, ids, *found, vocab, logits.stride(0), k), K=width, CHUNK=_CHUNK, **pdl
    )
    _merge[(rows,)](
        *(logits, ids, *found, chosen, rank, top_ids, top, logits.stride(0), chunks, k),
        CHUNKS=triton.next_power_of_2(chunks),
        K=width,
        **pdl,
    )
    return chosen, rank, top_ids, top


def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    prompt_seen: Tensor,
    output_count: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """In place on logits[B,V] float32, as the reference says."""
    factors = {"repetition": repetition, "presence": presence, "frequency": frequency}
    tables = {"prompt_seen": prompt_seen, "output_count": output_count}
    expect_rows("apply_penalties", logits=logits)
    expect_contiguous("apply_penalties", **factors, **tables)
    rows, vocab = logits.shape
    if logits.numel():
        _penalise[(rows, triton.cdiv(vocab, _CHUNK))](
            *(logits, slots, prompt_seen.view(torch.uint8), output_count),
            *(repetition, presence, frequency, vocab, logits.stride(0)),
            BLOCK=_CHUNK,
            **pdl_options(logits),
        )


def specimens(arch: str) -> Iterator[Specimen]:
    """A vocabulary of 151936 and 20 alternatives."""
    constants, options = specimen_pdl(arch)
    types = dict.fromkeys(("logits", "tops", "sums", "best"), "*fp32")
    types |= {"ids": "*i64", "greater": "*i32", "best_ids": "*i32", "row_stride": "i32:16"}
    yield Specimen(
        "logprobs scan",
        _scan,
        types | {"vocab": "i32", "k": "i32"},
        {"K": 32, "CHUNK": _CHUNK, **constants},
        options=options,
        quick=True,
    )
    results = {"chosen": "*fp32", "rank": "*i64", "top_ids": "*i64", "top": "*fp32"}
    yield Specimen(
        "logprobs merge",
        _merge,
        types | results | {"chunks": "i32", "k": "i32"},
        {"K": 32, "CHUNKS": 128, **constants},
        options=options,
    )
    factors = dict.fromkeys(("logits", "repetition", "presence", "frequency"), "*fp32")
    histories = {"slots": "*i64", "prompt_seen": "*u8", "output_count": "*i32"}
    yield Specimen(
        "apply_penalties",
        _penalise,
        factors | histories | {"vocab": "i32", "row_stride": "i32:16"},
        {"BLOCK": _CHUNK, **constants},
        options=options,
    )


register_triton("logprobs", logprobs, (torch.float32,))
register_triton("apply_penalties", apply_penalties, (torch.float32,))
