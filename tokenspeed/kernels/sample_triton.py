# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Sampling in Triton: two launches, whatever the rows ask for. Knows no slots and no requests.

`_scan` reads chunks of all rows at once: the largest logit, and the largest with noise where
nothing is cut. That decides greedy and plain rows. `_choose` has one program a row: for the others
it counts tokens by their distance from the largest, keeps the few bins that can matter (their ids
in a list if they are few), finds the exact cut by bisection on the bits of the logits, and takes
the noisy best of what is left. The noise is the reference's hash of (seed, position, token).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

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
_LISTED = 4096  # candidates that are listed; more are looked for in the whole row
_VERIFY_BLOCK = 64


@triton.jit
def _log(x):
    """Natural logarithm of positive, normal, finite float32, within 2e-7 of max(1, |log x|)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the mantissa is in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = 7.0376836292e-2 * m - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    tail = p * m * m * m + e * -2.12194440e-4 - m * m * 0.5
    return m + tail + e * 0.693359375


@triton.jit
def _mix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(seed, position, token):
    """Gumbel(0, 1) noise of int32 tokens; seed and position are int64."""
    seed = seed.to(tl.uint64, bitcast=True)
    key = _mix64(_mix64(seed) + position.to(tl.uint64, bitcast=True))
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = _mix32(_mix32(token.to(tl.uint32) + low) ^ high)
    # (bits + 0.5) / 2^32 with the bits' relative precision near 0, by way of two halves.
    upper = (bits >> 16).to(tl.float32)
    lower = (bits & 0xFFFF).to(tl.float32) + 0.5
    u = tl.minimum((upper * 65536.0 + lower) * 2.0**-32, 1.0 - 2.0**-24)
    # log1p(-u) = log(w) * -u / (w - 1) with w the rounded 1 - u (Kahan); -u where w is 1.
    w = 1.0 - u
    rest = w - 1.0
    race = tl.where(rest == 0.0, u, _log(w) * u / tl.where(rest == 0.0, -1.0, rest))
    return -_log(race)


@triton.jit
def _first_best(values, ids, inside):
    """The largest value, and the lowest id that has it."""
    top = tl.max(tl.where(inside, values, -float("inf")), 0)
    return top, tl.min(tl.where(inside & (values == top), ids, 2147483647), 0)


@triton.jit
def _scan(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    tops,
    top_ids,
    noisies,
    noisy_ids,
    vocab,
    row_stride,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, chunk) -> [B, chunks]: its largest logit (+inf for NaN) and noisy best."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    slot = row * tl.num_programs(1) + chunk
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    pdl_wait(PDL)
    x = tl.load(logits + row.to(tl.int64) * row_stride + at, mask=inside, other=-float("inf"))
    x = tl.where(x == x, x, float("inf"))
    top, top_id = _first_best(x, at, inside)
    tl.store(tops + slot, top)
    tl.store(top_ids + slot, top_id)
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    uncut = (k <= 0) | (k >= vocab)
    uncut = uncut & (tl.load(top_p + row) >= 1.0) & (tl.load(min_p + row) <= 0.0)
    if uncut & (heat >= 1e-5):
        noisy = tl.div_rn(x, heat) + _noise(tl.load(seed + row), tl.load(position + row), at)
        best, best_id = _first_best(noisy, at, inside)
        tl.store(noisies + slot, best)
        tl.store(noisy_ids + slot, best_id)
    pdl_release(PDL)


@triton.jit
def _key(x):
    """An int32 that rises with x (float32, no NaN); both zeros have one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _bin(value, largest):
    """0 to 2046 by the distance from the largest, 64 bins a nat."""
    return tl.minimum((largest - value) * 64.0, 2046.0).to(tl.int32)


@triton.jit
def _at(logits, listed, start, length, is_listed, heat, largest, least, limit, BLOCK: tl.constexpr):
    """A block of candidates: ids, values, and which are any."""
    place = start + tl.arange(0, BLOCK)
    inside = place < length
    found = tl.load(listed + place, mask=inside & is_listed, other=0)
    token = tl.where(is_listed, found, place)
    x = tl.load(logits + token, mask=inside, other=-float("inf"))
    value = tl.div_rn(x, heat)
    member = inside & (value >= least) & (value > -float("inf"))
    return token, value, member & (_bin(value, largest) <= limit)


@triton.jit
def _kept(token, value, cut, cut_id):
    """Falling values, then rising ids, up to (cut, cut_id)."""
    key = _key(value)
    return (key > cut) | ((key == cut) & (token <= cut_id))


@triton.jit
def _tally(
    logits,
    listed,
    length,
    is_listed,
    heat,
    largest,
    least,
    limit,
    cut,
    cut_id,
    key,
    BLOCK: tl.constexpr,
):
    """Of what a cut keeps, the tokens whose key is at least `key`: their number and their mass."""
    count, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        token, value, member = _at(
            logits, listed, start, length, is_listed, heat, largest, least, limit, BLOCK
        )
        member = member & _kept(token, value, cut, cut_id) & (_key(value) >= key)
        count += member.to(tl.int32)
        mass += tl.where(member, tl.exp(value - largest), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _nth_equal(
    logits,
    listed,
    length,
    is_listed,
    heat,
    largest,
    least,
    limit,
    key,
    wanted,
    BLOCK: tl.constexpr,
):
    """The id of the `wanted`-th candidate, in rising ids, that has this key."""
    before = wanted * 0
    found = before - 1
    for start in range(0, length, BLOCK):
        token, value, member = _at(
            logits, listed, start, length, is_listed, heat, largest, least, limit, BLOCK
        )
        equal = (member & (_key(value) == key)).to(tl.int32)
        order = before + tl.cumsum(equal, 0)
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (order == wanted), token, -1), 0))
        before += tl.sum(equal, 0)
    return found


@triton.jit
def _limit(logits, listed, vocab, heat, largest, least, k, p, CHUNK: tl.constexpr):
    """The last bin that the cuts can reach, how many tokens there are up to it, and all mass.

    With a cut by rank the cut by mass needs all tokens of that cut; alone, it needs few.
    """
    bins = tl.arange(0, 2048)
    counts, mass = tl.zeros([2048], tl.int32), tl.zeros([CHUNK], tl.float64)
    for start in range(0, vocab, CHUNK):
        _, value, member = _at(
            logits, listed, start, vocab, False, heat, largest, least, 2046, CHUNK
        )
        mass += tl.where(member, tl.exp(value - largest), 0.0).to(tl.float64)
        counts += tl.histogram(tl.where(member, _bin(value, largest), 2047), 2048)
    counts = tl.where(bins == 2047, 0, counts)
    upto = tl.cumsum(counts, 0)
    limit = 2046
    if k > 0:
        limit = tl.minimum(limit, tl.sum((upto < k).to(tl.int32), 0))
    elif p < 1.0:
        # A bin's mass lies between its tokens' number times the mass at its two ends.
        most = tl.exp(bins.to(tl.float32) / -64.0) * counts.to(tl.float32)
        total = tl.sum(tl.where(bins <= limit, most, 0.0), 0)
        fewest = tl.where(bins < 2046, most * 0.984, 0.0)
        short = tl.cumsum(fewest, 0) < p * total * 1.001
        limit = tl.minimum(limit, tl.sum(short.to(tl.int32), 0))
    return limit, tl.sum(tl.where(bins <= limit, counts, 0), 0), tl.sum(mass, 0)


@triton.jit
def _list(logits, listed, vocab, heat, largest, least, limit, CHUNK: tl.constexpr):
    """Writes the candidates' ids, rising."""
    before = vocab * 0
    for start in range(0, vocab, CHUNK):
        token, _, member = _at(
            logits, listed, start, vocab, False, heat, largest, least, limit, CHUNK
        )
        place = before + tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(listed + place, token, mask=member)
        before += tl.sum(member.to(tl.int32), 0)


@triton.jit
def _rank_cut(
    logits, listed, length, is_listed, heat, largest, least, limit, lowest, highest, k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The k-th candidate, as (key, id): the largest key that k candidates reach, then ids."""
    low, high = lowest, highest
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        count, _ = _tally(
            logits, listed, length, is_listed, heat, largest, least, limit,
            -2147483648, 2147483647, middle.to(tl.int32), BLOCK,
        )  # fmt: skip
        low, high = tl.where(count >= k, middle, low), tl.where(count >= k, high, middle)
    above, _ = _tally(
        logits, listed, length, is_listed, heat, largest, least, limit,
        -2147483648, 2147483647, (low + 1).to(tl.int32), BLOCK,
    )  # fmt: skip
    cut = low.to(tl.int32)
    cut_id = _nth_equal(
        logits, listed, length, is_listed, heat, largest, least, limit, cut, k - above, BLOCK
    )
    return cut, cut_id


@triton.jit
def _mass_cut(
    logits, listed, length, is_listed, heat, largest, least, limit, lowest, highest, share,
    cut, cut_id,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The last of the fewest candidates within a cut whose mass reaches `share`: (key, id)."""
    low, high = lowest, highest
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        _, mass = _tally(
            logits, listed, length, is_listed, heat, largest, least, limit,
            cut, cut_id, middle.to(tl.int32), BLOCK,
        )  # fmt: skip
        low, high = tl.where(mass >= share, middle, low), tl.where(mass >= share, high, middle)
    key = low.to(tl.int32)
    _, above = _tally(
        logits, listed, length, is_listed, heat, largest, least, limit,
        cut, cut_id, (low + 1).to(tl.int32), BLOCK,
    )  # fmt: skip
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    each = tl.exp(bits.to(tl.float32, bitcast=True) - largest).to(tl.float64)
    needed = tl.maximum(tl.ceil((share - above) / each).to(tl.int32), 1)
    last = _nth_equal(
        logits, listed, length, is_listed, heat, largest, least, limit, key, needed, BLOCK
    )
    # Where rounding wants one more than there are, the earlier cut stands.
    last = tl.where(last < 0, 2147483647, last)
    return key, tl.where(key == cut, tl.minimum(last, cut_id), last)


@triton.jit
def _cut_sample(
    logits, listed, vocab, heat, largest, k, p, m, seed, position,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The id for a row that is cut by rank, by mass or by least probability."""
    least = -float("inf")
    if m > 0.0:
        least = tl.minimum(largest + _log(m), largest)
    limit, total, whole = _limit(logits, listed, vocab, heat, largest, least, k, p, CHUNK)
    is_listed = total <= LISTED
    if is_listed:
        _list(logits, listed, vocab, heat, largest, least, limit, CHUNK)
    tl.debug_barrier()
    length = tl.where(is_listed, total, vocab)
    # Every candidate's key is at least `lowest`, and below `highest`.
    highest = _key(largest).to(tl.int64) + 1
    lowest = _key(tl.where(limit < 2046, largest - (limit + 2) / 64.0, -float("inf"))).to(tl.int64)
    cut, cut_id = -2147483648, 2147483647
    if (k > 0) & (k < total):
        cut, cut_id = _rank_cut(
            logits, listed, length, is_listed, heat, largest, least, limit, lowest, highest, k,
            BLOCK,
        )  # fmt: skip
    if p < 1.0:
        if k > 0:
            _, whole = _tally(
                logits, listed, length, is_listed, heat, largest, least, limit,
                cut, cut_id, cut, BLOCK,
            )  # fmt: skip
        cut, cut_id = _mass_cut(
            logits, listed, length, is_listed, heat, largest, least, limit, lowest, highest,
            p.to(tl.float64) * whole, cut, cut_id, BLOCK,
        )  # fmt: skip
    best, best_id = largest * 0.0 - float("inf"), cut_id * 0 + 2147483647
    for start in range(0, length, BLOCK):
        token, value, member = _at(
            logits, listed, start, length, is_listed, heat, largest, least, limit, BLOCK
        )
        member = member & _kept(token, value, cut, cut_id)
        found, found_id = _first_best(value + _noise(seed, position, token), token, member)
        best_id = tl.where(found > best, found_id, best_id)
        best = tl.maximum(found, best)
    return best_id


@triton.jit
def _choose(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    tops,
    top_ids,
    noisies,
    noisy_ids,
    listed,
    out,
    vocab,
    row_stride,
    chunks,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program row -> out[row]: greedy, plain, or cut; -1 where the largest is not finite."""
    row = tl.program_id(0)
    at = tl.arange(0, CHUNKS)
    inside = at < chunks
    slot = row * chunks + at
    pdl_wait(PDL)
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    p, m = tl.load(top_p + row), tl.load(min_p + row)
    places = tl.load(top_ids + slot, mask=inside, other=0)
    largest, choice = _first_best(tl.load(tops + slot, mask=inside, other=0.0), places, inside)
    k = tl.where(k >= vocab, 0, k)
    if heat >= 1e-5:
        if (k <= 0) & (p >= 1.0) & (m <= 0.0):
            places = tl.load(noisy_ids + slot, mask=inside, other=0)
            noisy = tl.load(noisies + slot, mask=inside, other=0.0)
            _, choice = _first_best(noisy, places, inside)
        elif (largest < float("inf")) & (largest > -float("inf")):
            choice = _cut_sample(
                logits + row.to(tl.int64) * row_stride,
                listed + row.to(tl.int64) * LISTED,
                vocab,
                heat,
                tl.div_rn(largest, heat),
                k,
                p,
                m,
                tl.load(seed + row),
                tl.load(position + row),
                LISTED,
                CHUNK,
                BLOCK,
            )
    pdl_release(PDL)
    valid = (largest < float("inf")) & (largest > -float("inf"))
    tl.store(out + row, tl.where(valid, choice, -1).to(tl.int64))


@triton.jit
def _verify(ids, drafts, q_start, out, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program row -> out[row]: 1 + leading places where ids[i] is drafts[i + 1]; 0 if empty."""
    row = tl.program_id(0)
    pdl_wait(PDL)
    first, last = tl.load(q_start + row), tl.load(q_start + row + 1) - 1
    stop = last
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < last
        said = tl.load(ids + at, mask=mask, other=0)
        fed = tl.load(drafts + at + 1, mask=mask, other=0)
        stop = tl.minimum(stop, tl.min(tl.where(mask & (said != fed), at, last), 0))
    pdl_release(PDL)
    tl.store(out + row, stop - first + 1)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """logits[B,V] float32 and parameters [B] -> ids[B] int64, as the reference says."""
    expect_rows("sample", logits=logits)
    expect_contiguous("sample", temperature=temperature, top_p=top_p, min_p=min_p)
    rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError("sample: logits of no tokens")
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return ids
    chunks = triton.cdiv(vocab, _CHUNK)
    settings = (temperature, top_k, top_p, min_p, seed, position)
    floats = torch.empty((2, rows, chunks), dtype=torch.float32, device=logits.device)
    places = torch.empty((2, rows, chunks), dtype=torch.int32, device=logits.device)
    found = (floats[0], places[0], floats[1], places[1])
    listed = torch.empty((rows, _LISTED), dtype=torch.int32, device=logits.device)
    _scan[(rows, chunks)](
        *(logits, *settings, *found, vocab, logits.stride(0)),
        CHUNK=_CHUNK,
        **pdl_options(logits),
    )
    _choose[(rows,)](
        *(logits, *settings, *found, listed, ids, vocab, logits.stride(0), chunks),
        CHUNKS=triton.next_power_of_2(chunks),
        LISTED=_LISTED,
        CHUNK=_CHUNK,
        BLOCK=1024,
        num_warps=8,
        **pdl_options(logits),
    )
    return ids


def verify(ids: Tensor, drafts: Tensor, q_start: Tensor) -> Tensor:
    """ids[T], drafts[T] int64, q_start[R+1] int32 -> accepted[R] int32, as the reference says."""
    accepted = torch.empty(len(q_start) - 1, dtype=torch.int32, device=ids.device)
    if len(accepted):
        _verify[(len(accepted),)](
            ids,
            drafts,
            q_start,
            accepted,
            BLOCK=_VERIFY_BLOCK,
            num_warps=1,
            **pdl_options(ids),
        )
    return accepted


def specimens(arch: str) -> Iterator[Specimen]:
    """A vocabulary of 102400, of 151936."""
    constants, options = specimen_pdl(arch)
    types = dict.fromkeys(("logits", "temperature", "top_p", "min_p", "tops", "noisies"), "*fp32")
    types |= dict.fromkeys(("top_ids", "noisy_ids", "top_k"), "*i32")
    types |= {"seed": "*i64", "position": "*i64", "vocab": "i32", "row_stride": "i32:16"}
    yield Specimen(
        "sample scan", _scan, types, {"CHUNK": _CHUNK, **constants}, options=options, quick=True
    )
    blocks = {"CHUNKS": 128, "LISTED": _LISTED, "CHUNK": _CHUNK, "BLOCK": 1024}
    yield Specimen(
        "sample choose",
        _choose,
        types | {"listed": "*i32", "out": "*i64", "chunks": "i32"},
        {**blocks, **constants},
        num_warps=8,
        options=options,
    )
    yield Specimen(
        "verify",
        _verify,
        {"ids": "*i64", "drafts": "*i64", "q_start": "*i32", "out": "*i32"},
        {"BLOCK": _VERIFY_BLOCK, **constants},
        num_warps=1,
        options=options,
    )


register_triton("sample", sample, (torch.float32,))
register_triton("verify", verify, (torch.int64, torch.float32))
