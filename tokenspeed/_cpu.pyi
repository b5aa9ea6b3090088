# SPDX-License-Identifier: MIT
"""The CPU kernels, compiled from csrc/cpu. Calls, shapes and meanings are those of the references
in tokenspeed.kernels; tensors are float32 or bfloat16 on a CPU. `ValueError` names an argument of a
wrong shape, dtype, layout or index; page ids of `page_table` are trusted."""

from typing import Self

import torch
from torch import Tensor

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]: ...
def silu_mul(x: Tensor) -> Tensor: ...
def rope_append_gqa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache_index: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    interleaved: bool,
) -> Tensor: ...
def rope_append_mla(
    q_pe: Tensor,
    k_pe: Tensor,
    latent: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    cache_index: Tensor,
    cache: Tensor,
    interleaved: bool,
) -> Tensor: ...
def attention_gqa(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    window: int = 0,
    max_q_len: int = 0,
) -> Tensor: ...
def attention_mla(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    max_q_len: int = 0,
) -> Tensor: ...
def attention_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    k_start: Tensor,
    scale: float,
    causal: bool = True,
    q_tail: Tensor | None = None,
    k_tail: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def merge_state(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]: ...
def gather_latent(
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    first: Tensor,
    starts: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor: ...
def prefer_huge_pages(memory: Tensor) -> None: ...  # fewer faults and misses of the TLB
def keep_freed_memory() -> None: ...  # in this process, for what is allocated next
def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm: bool,
    scale: float,
) -> tuple[Tensor, Tensor]: ...
def moe(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    weights: Tensor,
    ids: Tensor,
    addend: Tensor | None = None,
) -> Tensor: ...

class PackedWeight:  # a weight in the layout that the kernels stream
    @property
    def shape(self) -> tuple[int, ...]: ...  # of the weight
    @property
    def data(self) -> Tensor: ...  # uint8 [count, bytes of each]
    @property
    def num_bytes(self) -> int: ...

def pack(weight: Tensor) -> PackedWeight: ...
def pack_codes(codes: Tensor, scales: Tensor, bits: int, group: int) -> PackedWeight: ...
def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]: ...
def linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, wide: bool = False
) -> Tensor: ...
def head_linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor: ...
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor: ...
def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    prompt_seen: Tensor,
    output_count: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None: ...
def embedding(ids: Tensor, weight: Tensor, first: int) -> Tensor: ...
def add(x: Tensor, y: Tensor) -> Tensor: ...

class Arena:  # memory of recordings, of which one runs at a time
    def __init__(self) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    def share(self, tensor: Tensor) -> None: ...  # other recordings may overwrite it from now on

class Recording:
    """The kernel calls made inside its `with` block, for steps of `num_tokens` tokens in `num_rows`
    rows, or of others of up to `room` tokens, unless it `is_fixed`: a call allows that size alone.

    `with_room`: a result, with room for as many tokens on its first axis. `ValueError`: no token,
    or a size that it does not serve.
    """

    def __init__(self, arena: Arena, num_tokens: int, num_rows: int, room: int) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    @property
    def num_calls(self) -> int: ...
    @property
    def is_fixed(self) -> bool: ...
    @property
    def room(self) -> int: ...
    def with_room(self, result: Tensor) -> Tensor: ...
    def replay(self, num_tokens: int, num_rows: int) -> None: ...

def isa() -> str: ...  # the build in use
def compiler() -> str: ...  # the version of what compiled the module
def available_isas() -> list[str]: ...  # builds this machine runs, the widest first
def set_isa(name: str) -> None: ...  # for tests; ValueError if it does not run here
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...  # no kernel may be running
