# SPDX-License-Identifier: MIT
"""The messages between a front end and the engine. Knows ids and parameters, no text, no sockets.

Plain frozen dataclasses: the in-process `LLM` passes them as they are, the server's wire encodes
them with a schema (never pickle).
"""

from dataclasses import dataclass, field

from tokenspeed.execution.sampling_params import SamplingParams


@dataclass(frozen=True)
class GenerateRequest:
    """Prompt in, tokens out. `request_id` is the front end's own 64-bit number, never a client's."""

    request_id: int
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: list[int] = field(default_factory=list)  # end-of-sequence and stop_token_ids
    salt: bytes = b""  # requests of different salts never share cached pages


@dataclass(frozen=True)
class AbortRequest:
    request_id: int


@dataclass(frozen=True)
class TokenLogprobs:
    """One position: the chosen token first, then the likeliest in falling order."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 is the likeliest


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


@dataclass(frozen=True)
class EngineStats:
    """What the gateway's metrics show; sent with outputs at most a few times a second."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of pages held by requests, 0 to 1
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_steps: int = 0
