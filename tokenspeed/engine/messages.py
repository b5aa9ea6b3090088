# SPDX-License-Identifier: MIT
"""The messages between a front end and the engine. Knows ids and parameters, no text, no sockets.

Plain frozen dataclasses: the in-process `LLM` passes requests and outputs as they are; the server's
wire encodes every message with a schema (never pickle). `Down` goes to the engine, `Up` comes back.
"""

from dataclasses import dataclass, field

from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs

GATEWAY_SHIFT = 55  # of a request's 63 bits the upper 8 say which gateway gave the number
MAX_GATEWAYS = 64


def gateway_of(request_id: int) -> int:
    """The number of the gateway that gave a request or an order its id; 0 is the first."""
    return request_id >> GATEWAY_SHIFT


@dataclass(frozen=True)
class Retention:
    """How long a prompt's cached pages should outlive the request, if there is room."""

    seconds: float = 0.0
    pinned: bool = False  # evicted only when nothing else is left


@dataclass(frozen=True)
class CacheReceipt:
    """What the prefix cache had of a prompt beyond the number of tokens, and why not more."""

    num_host: int = 0  # of the tokens found, those in host memory; the others on the device
    reason: str = ""  # "" | "diverged" | "evicted" | "never_cached" | "disabled"
    kept_until_s: float = 0.0  # seconds from now that the prompt's pages are meant to stay


@dataclass(frozen=True)
class GenerateRequest:
    """Prompt in, tokens out. `request_id` is the front end's own 64-bit number, no client's."""

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: list[int] = field(default_factory=list)  # end-of-sequence and stop_token_ids
    salt: bytes = b""  # requests of different salts never share cached pages
    user: str = ""  # who gets a fair share with the others: a tenant's user, subagents folded in
    retention: Retention = Retention()
    tps_floor: float | None = None  # tokens per second promised; None: the default, 0: none
    priority: int = 0  # lower is sooner, in [-1000, 1000]
    max_wait_s: float | None = None  # refused if it waits, or would wait, longer than this


@dataclass(frozen=True)
class AbortRequest:
    """Down: end this request, in whatever state it is."""

    request_id: int


@dataclass(frozen=True)
class TokenOutput:
    """New tokens of one request. The last one carries `finish_reason`."""

    request_id: int
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length" | "error"
    stop_token_id: int | None = None  # the id that ended it, if one did
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None  # one per token id
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first output only
    error: str | None = None
    queue_s: float = 0.0  # with the last output: seconds from arrival to the first step
    prefill_s: float = 0.0  # seconds from the first step to the first token
    receipt: CacheReceipt | None = None  # with the first output
    num_draft_tokens: int = 0  # with the last output: tokens that were drafted for it
    num_accepted_tokens: int = 0  # of these, what came
    code: str | None = None  # of the error: "overloaded" if there is no room, before any token
    retry_after_s: float | None = None  # with "overloaded"


@dataclass(frozen=True)
class DrafterStats:
    """What came of one drafter's drafts, since the start."""

    name: str
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)  # drafts whose token there was kept


@dataclass(frozen=True)
class StepTimeStats:
    """How well steps' times are foretold, since the start."""

    num_steps: int = 0  # whose time was foretold
    predicted_s: float = 0.0  # of these steps together
    measured_s: float = 0.0
    error: float = 0.0  # median relative error of the latest of these


@dataclass(frozen=True)
class SpeculationStats:
    """How speculative decoding goes, since the start."""

    drafters: list[DrafterStats]
    depths: list[int]  # [depth] decoding rows that were given a draft of so many tokens


@dataclass(frozen=True)
class PacingStats:
    """How well floors of tokens per second are held, since the start (see docs/pacing.md)."""

    floor_misses_for_progress: int = 0  # steps that took prompts though a floor may miss for it
    num_late: int = 0  # outputs that came after they were due
    num_refused: int = 0  # requests, for lack of room
    num_unmeetable: int = 0  # requests whose floor could not be met even alone


@dataclass(frozen=True)
class EngineStats:
    """What the gateway's metrics show; sent with outputs at most a few times a second."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of pages held by requests, 0 to 1
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    expert_load_mean: float = 0.0  # heaviest rank over the mean; 0 without expert balancing
    expert_load_worst: float = 0.0  # the same of the worst layer
    expert_load_rebalances: int = 0
    expert_load_slots_moved: int = 0
    num_retained_pages: int = 0  # under retention, in use or not
    num_pinned_pages: int = 0
    num_cached_pages: int = 0  # that wait for a hit: no request uses them
    num_steps: int = 0  # these are of `engine/step_counts.py`
    busy_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_draft_tokens: int = 0
    speculation: SpeculationStats | None = None
    pacing: PacingStats | None = None
    step_times: StepTimeStats | None = None  # where somebody plans by them


@dataclass(frozen=True)
class AddGrammar:
    """Down: requests may name this grammar from now on, until it is dropped.

    The first is the vocabulary, under its own key (`execution/grammars.py`). Keys are the senders':
    what several have added is dropped when all have dropped it.
    """

    key: str
    data: bytes


@dataclass(frozen=True)
class DropGrammar:
    """Down: no later request names it."""

    key: str


@dataclass(frozen=True)
class RetainPrefix:
    """Down: put the cached pages of these tokens under retention; the answer is `PrefixPages`.

    The default retention takes it back, from pages on which no other branch builds.
    """

    call_id: int  # the sender's, 64 bits
    token_ids: list[int]
    salt: bytes = b""
    retention: Retention = Retention()


@dataclass(frozen=True)
class ReleasePrefix:
    """Down: drop the cached pages of these tokens that nobody uses and on which no other branch
    builds; the answer is `PrefixPages`."""

    call_id: int
    token_ids: list[int]
    salt: bytes = b""


@dataclass(frozen=True)
class FlushCache:
    """Down: forget every cached page that no request uses."""


@dataclass(frozen=True)
class GatewayGone:
    """Down, from the first gateway: another one has ended, and what it asked for is not wanted."""

    number: int


@dataclass(frozen=True)
class Shutdown:
    """Down: leave now. Draining is the gateway's business."""


@dataclass(frozen=True)
class Loading:
    """Up: how far start-up is."""

    fraction: float  # 0 to 1
    what: str


@dataclass(frozen=True)
class Ready:
    """Up: requests are accepted from now on."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int


@dataclass(frozen=True)
class Outputs:
    """Up: everything that one step produced, in one message."""

    outputs: list[TokenOutput]


@dataclass(frozen=True)
class Rejected:
    """Up: the answer to a request that cannot be served as asked (see `RequestError`)."""

    request_id: int
    message: str
    field: str | None
    code: str


@dataclass(frozen=True)
class StatsMessage:
    """Up: at most a few times a second, and once when the engine falls idle."""

    stats: EngineStats


@dataclass(frozen=True)
class PrefixPages:
    """Up: on how many pages a `RetainPrefix` or `ReleasePrefix` acted."""

    call_id: int
    num_pages: int


@dataclass(frozen=True)
class Heartbeat:
    """Up, from a thread of its own from the process's first moment on.

    A watchdog reads: no heartbeat, the process is stopped or dead; `has_work` with `num_steps`
    standing still, a step hangs.
    """

    num_steps: int
    has_work: bool


@dataclass(frozen=True)
class GatewayStuck:
    """Up, to the first gateway: another one does not read, and is sent nothing any more."""

    number: int


@dataclass(frozen=True)
class Fatal:
    """Up: the engine leaves because of this."""

    message: str


PrefixOrder = RetainPrefix | ReleasePrefix
Down = (
    PrefixOrder
    | GenerateRequest
    | AbortRequest
    | FlushCache
    | GatewayGone
    | Shutdown
    | AddGrammar
    | DropGrammar
)
Up = (
    Loading
    | Ready
    | Outputs
    | Rejected
    | StatsMessage
    | PrefixPages
    | Heartbeat
    | GatewayStuck
    | Fatal
)
