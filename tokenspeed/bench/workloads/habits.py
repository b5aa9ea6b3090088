# SPDX-License-Identifier: MIT
"""What coding agents and their users do, as distributions: lengths, gaps, steps, events.

`FITTED` has log-normal fits to 710 recorded sessions of a coding agent; `MEASURED` has those
sessions' quantiles where the fits miss them. Tokens and seconds. Knows no blocks and no session.
"""

import math
from dataclasses import dataclass, replace

from tokenspeed.bench.workloads.sampling import Counts, LogNormal, Mixture, Quantiles, Sampler

# The quantiles of 20 versions of a client, in an order of their own: sizes are not correlated.
_MIXED = tuple((7 * i % 20 + 0.5) / 20 for i in range(20))


@dataclass(frozen=True, slots=True)
class Client:
    """A kind of agent: tokens of its system prompt and of its tools' schemas, by version."""

    name: str
    system: tuple[int, ...]
    tools: tuple[int, ...]


_SYSTEM = Quantiles((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (1500, 2048, 2324, 2773, 3004, 3732, 6100))
_TOOLS = Quantiles(
    (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (8500, 9292, 10660, 12260, 12590, 12970, 15500)
)
CLIENTS = {
    "claude": Client(
        "claude",
        tuple(round(_SYSTEM.at(share)) for share in _MIXED),
        tuple(round(_TOOLS.at((i + 0.5) / 20)) for i in range(20)),
    ),
    "codex": Client("codex", (4000, 4200), (9000, 8800)),
    "opencode": Client("opencode", (2500, 2600), (8500, 8400)),
    "mini": Client("mini", (1200,), (300,)),
}
SUBAGENT = Client("subagent", (950,), (7770,))


@dataclass(frozen=True, slots=True)
class Habits:
    """Of the users and their agents. Probabilities are a step's unless said otherwise."""

    first_context: Sampler  # of a session's first prompt behind system and tools
    resumed_tokens: int  # a first context from here on is a resumed session's
    messages: Sampler  # that a user writes in a session
    requests: Sampler  # of a fresh session: its steps are chosen near that
    resumed_requests: Sampler
    steps: Sampler  # requests for a message of the user
    append: Sampler  # tokens that the request before does not have
    output: Sampler
    tool_gap: Sampler
    user_gap: Sampler
    rules: Sampler  # tokens of a repository's rules
    window: Sampler  # context at which a client compacts
    large_window: int
    large_windows: float  # share of fresh sessions that have it; all resumed ones beyond `window`
    summary: Sampler  # what a compaction leaves behind system and tools
    compaction: float = 0.002  # before the window is full; 1% of all steps with those where it is
    haste: float = 0.4  # sessions of few requests append more: by (typical / requests) ** haste
    typical_requests: int = 120
    rerender: float = 0.010  # the history is written anew behind system and tools
    tools_change: float = 0.003
    cancel: float = 0.015
    retry: float = 0.005
    side_calls: float = 1.0  # a session's titles and summaries
    repositories: int = 50


FITTED = Habits(
    first_context=Quantiles(
        (0, 0.1, 0.25, 0.5, 0.6, 0.73, 0.75, 0.8, 0.9, 0.99, 1),
        (300, 1500, 3700, 7300, 40_000, 66_000, 90_000, 108_000, 245_000, 702_000, 850_000),
    ),
    resumed_tokens=40_000,
    messages=LogNormal(math.log(4.6), 1.40, 1, 400),
    requests=Quantiles((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (2, 12, 28, 65, 118, 195, 400)),
    resumed_requests=Quantiles((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (2, 5, 9, 21, 40, 90, 240)),
    steps=Counts((0.49, 0.15, 0.07, 0.04, 0.03, 0.02), LogNormal(math.log(17), 0.94, 7, 400)),
    append=LogNormal(6.795, 1.210, 8, 66_000),
    output=LogNormal(5.564, 0.895, 1, 18_000),
    tool_gap=LogNormal(2.537, 1.279, 0.1, 7200),
    user_gap=LogNormal(4.906, 1.740, 1.0, 7200),
    rules=Quantiles((0, 0.3, 1), (64, 500, 4000)),
    window=Quantiles((0, 0.5, 1), (138_000, 154_000, 175_000)),
    large_window=900_000,
    large_windows=0.17,
    summary=Quantiles((0, 1), (5000, 10_000)),
)

MEASURED = replace(
    FITTED,
    summary=Quantiles((0, 0.1, 0.25, 0.5, 0.75, 1), (3000, 7000, 17_000, 45_000, 80_000, 100_000)),
    append=Quantiles(
        (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1), (90, 230, 372, 705, 1640, 3900, 12_000, 66_000)
    ),
    output=Quantiles(
        (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1), (20, 105, 137, 216, 429, 899, 3663, 18_000)
    ),
    tool_gap=Quantiles((0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1), (2, 4, 5, 9, 19, 74, 924, 7200)),
    user_gap=Quantiles(
        (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1), (4, 16, 40, 127, 409, 1543, 6854, 7200)
    ),
)

# What the tools alone take, without a person who approves: most are done at once, builds are not.
LOCAL_TOOLS = Mixture(
    ((0.8, Quantiles((0, 1), (0.1, 2.0))), (0.2, Quantiles((0, 1), (10.0, 600.0))))
)
