# SPDX-License-Identifier: MIT
"""From logits to ids: sampling, penalties, logprobs. Signatures and torch references.

Noise is a hash of (seed, position, token), so a row's id depends on nothing else: not on the batch,
not on earlier steps. Refuses to know slots, requests and stop rules.
"""

import torch
from torch import Tensor

from tokenspeed.kernels.registry import define

GREEDY_BELOW = 1e-5  # temperatures that would overflow the quotient take the largest logit
_LOW32 = 0xFFFFFFFF


def _signed64(value: int) -> int:
    """The two's complement reading of an unsigned 64-bit constant, as torch's int64 wants it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right64(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """The splitmix64 step: an int64 tensor read as unsigned."""
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right64(x, 30)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right64(x, 27)) * _signed64(0x94D049BB133111EB)
    return x ^ _shift_right64(x, 31)


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser on int64 tensors holding values below 2^32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW32
    return x ^ (x >> 16)


def gumbel_noise(seed: Tensor, position: Tensor, num_tokens: int) -> Tensor:
    """Gumbel(0, 1) noise [B, num_tokens] float32 from int64 seed[B] and position[B]."""
    key = _mix64(_mix64(seed) + position)[:, None]
    token = torch.arange(num_tokens, device=seed.device)[None, :]
    bits = _mix32(_mix32((token + (key & _LOW32)) & _LOW32) ^ _shift_right64(key, 32))
    # Uniform in (0, 1), finest near 0, where the noise is large and decides.
    uniform = ((bits.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform)).float()


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """logits[B,V] float32 -> ids[B] int64; -1 for a row with NaN or +inf, or with only -inf.

    temperature, top_p, min_p: float32 [B]; top_k: int32 [B], 0 or less for all; seed, position:
    int64 [B]. Temperature 0 (below 1e-5) takes the largest logit, the lowest id at a tie. Otherwise
    tokens are ranked by logit (lower id first at a tie); the top_k first stay, of these the ones
    whose probability is at least min_p times the largest, of these the fewest whose renormalised
    probabilities reach top_p. The winner has the largest logit / temperature + Gumbel noise.
    """
    largest = logits.amax(-1)
    valid = torch.isfinite(largest) & ~logits.isnan().any(-1)
    logits = torch.where(valid[:, None], logits, 0.0)
    greedy = temperature < GREEDY_BELOW
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)[None, :]
    kept = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    kept &= ordered >= ordered[:, :1] + min_p.log()[:, None]
    kept &= ordered > float("-inf")
    probability = ordered.masked_fill(~kept, float("-inf")).double().softmax(-1)
    before = probability.cumsum(-1) - probability
    kept &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    noise = gumbel_noise(seed, position, logits.shape[1]).gather(1, order)
    noisy = (ordered + noise).masked_fill(~kept, float("-inf"))
    place = torch.where(greedy, 0, noisy.argmax(-1))
    return torch.where(valid, order.gather(1, place[:, None])[:, 0], -1)


def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    prompt_seen: Tensor,
    output_count: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """In place on logits[B,V] float32; row b reads the histories of slot slots[b] (int64).

    prompt_seen[S,V] bool, output_count[S,V] int32, the three penalties float32 [B]. A token of the
    prompt or the output has a positive logit divided, a negative one multiplied by repetition;
    an output token then loses presence + frequency * count. No effect at 1, 0, 0.
    """
    count = output_count[slots]
    seen = prompt_seen[slots] | (count > 0)
    factor = repetition[:, None]
    logits.copy_(
        torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    )
    logits -= frequency[:, None] * count + presence[:, None] * (count > 0)


def logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits[B,V] float32, ids[B] int64 -> (chosen[B], rank[B], top_ids[B,k], top[B,k]).

    Log-softmax of the raw logits, before temperature and penalties. Rank 1 is the likeliest; equal
    logits share the better rank. top_ids come in falling order.
    """
    chosen_logit = logits.gather(1, ids[:, None])
    rank = (logits > chosen_logit).sum(-1) + 1
    total = logits.logsumexp(-1, keepdim=True)
    top, top_ids = logits.topk(k, dim=-1)
    return (chosen_logit - total)[:, 0], rank, top_ids, top - total


def verify(ids: Tensor, drafts: Tensor, q_start: Tensor) -> Tensor:
    """ids[T], drafts[T] int64, q_start[R+1] int32 -> accepted[R] int32. Waits for no device.

    ids[i] was sampled after token i, and drafts[i] is the token that was fed at place i. A row
    keeps ids[i] as long as the next token fed was the one sampled: 1 + the number of its leading
    places i with ids[i] == drafts[i + 1]; 0 for an empty row. Exact, as noise depends on the
    position alone.
    """
    rows, count = len(q_start) - 1, len(ids)
    place = torch.arange(count, device=ids.device)
    row = torch.searchsorted(q_start[1:].long(), place, right=True)  # `rows` behind the last
    last = q_start[1:].long() - 1
    stops = torch.ones(count, dtype=torch.bool, device=ids.device)
    stops[:-1] = ids[:-1] != drafts[1:]
    stop = torch.cat([last, last.new_full((1,), count)])
    stop.scatter_reduce_(0, row, torch.where(stops, place, count), "amin")
    return (stop[:rows] - q_start[:-1] + 1).to(torch.int32)


define(
    "sample",
    "(logits[B,V] f32, temperature[B] f32, top_k[B] int32, top_p[B] f32, min_p[B] f32, "
    "seed[B] int64, position[B] int64) -> ids[B] int64",
    sample,
)
define(
    "apply_penalties",
    "(logits[B,V] f32, slots[B] int64, prompt_seen[S,V] bool, output_count[S,V] int32, "
    "repetition[B] f32, presence[B] f32, frequency[B] f32) -> None, in place",
    apply_penalties,
)
define(
    "logprobs",
    "(logits[B,V] f32, ids[B] int64, k) -> (chosen[B], rank[B], top_ids[B,k], top[B,k])",
    logprobs,
)
define("verify", "(ids[T] int64, drafts[T] int64, q_start[R+1] int32) -> accepted[R] int32", verify)
