# SPDX-License-Identifier: MIT
"""Single requests that are no conversation: lengths as vLLM's `random`, or as ShareGPT's are.

Nothing is shared but an optional prefix of all. Knows no arrival process but that of `span_s`.
"""

import numpy as np

from tokenspeed.bench.session import Session, Turn, Workload
from tokenspeed.bench.workloads import checks
from tokenspeed.bench.workloads.scaling import scaled

BLOCK_SIZE = 64


def make(
    *,
    requests: int = 100,
    seed: int = 0,
    scale: float = 1.0,
    span_s: float = 0.0,
    input_tokens: int = 1024,
    output_tokens: int = 128,
    range_ratio: float = 0.0,
    prefix_tokens: int = 0,
) -> Workload:
    """Lengths uniform in `[n * (1 - range_ratio), n * (1 + range_ratio)]`, behind a shared prefix.

    Raises ValueError for senseless arguments.
    """
    for name, value in {"input_tokens": input_tokens, "output_tokens": output_tokens}.items():
        checks.at_least(name, value, 1)
    checks.at_least("prefix_tokens", prefix_tokens, 0)
    if not 0 <= range_ratio < 1:
        raise ValueError(f"range_ratio must be in [0, 1), not {range_ratio}")
    rng = np.random.default_rng(seed)
    inputs, outputs = (
        np.rint(mean * rng.uniform(1 - range_ratio, 1 + range_ratio, size=_count(requests)))
        for mean in (input_tokens, output_tokens)
    )
    return _workload("random", inputs, outputs, prefix_tokens, rng, seed, scale, span_s)


def sharegpt(
    *, requests: int = 100, seed: int = 0, scale: float = 1.0, span_s: float = 0.0
) -> Workload:
    """Log-normal lengths of the means of ShareGPT: 161 in and 338 out (Kwon et al., 2023, fig. 11).

    Clipped as vLLM filters them: prompts to [4, 1024], answers to [4, 1024].
    """
    rng = np.random.default_rng(seed)
    inputs, outputs = (
        np.clip(np.rint(rng.lognormal(mu, sigma, _count(requests))), 4, 1024)
        for mu, sigma in ((4.36, 1.30), (5.50, 0.95))
    )
    return _workload("sharegpt", inputs, outputs, 0, rng, seed, scale, span_s)


def _count(requests: int) -> int:
    checks.at_least("requests", requests, 1)
    return requests


def _workload(
    name: str,
    inputs: "np.typing.NDArray[np.float64]",
    outputs: "np.typing.NDArray[np.float64]",
    prefix_tokens: int,
    rng: np.random.Generator,
    seed: int,
    scale: float,
    span_s: float,
) -> Workload:
    prefix = tuple(range(prefix_tokens // BLOCK_SIZE))
    sessions, num_blocks = [], len(prefix)
    starts = checks.starts(rng, len(inputs), span_s)
    for number, (start_s, own, output) in enumerate(zip(starts, inputs, outputs, strict=True)):
        length = max(1, int(own)) + prefix_tokens
        own_blocks = length // BLOCK_SIZE - len(prefix)
        blocks = (*prefix, *range(num_blocks, num_blocks + own_blocks))
        num_blocks += own_blocks
        turn = Turn(blocks, length, max(1, int(output)), 0.0, "user", length % BLOCK_SIZE)
        unique = f"{name}-{number}"
        sessions.append(Session(unique, (turn,), BLOCK_SIZE, start_s, unique, None))
    return scaled(Workload(name, tuple(sessions), seed, 1.0), scale)
