# SPDX-License-Identifier: MIT
"""Other engines' kernels for latent attention, loaded from a folder where they are. No timing.

The folder holds what was unpacked from their wheels: `_flashmla_C*.so` and `_vllm_fa3_C*.so` (ops
registered with torch), the packages `flashinfer` and `vllm` (its Triton kernel). Arguments are
bound by the names that an op's own schema gives, so that versions may differ in their order.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gpu.problem import MlaProblem
from gpu.shapes import LATENT, PAGE

Prepared = tuple[list[Callable[[], Tensor]], float]  # calls, seconds of planning on the host


class Peer(Protocol):
    """`prepare` makes a call for each cache; the first does what is needed once a step."""

    @property
    def name(self) -> str: ...

    def refusal(self, problem: MlaProblem) -> str | None: ...

    def prepare(self, problem: MlaProblem) -> Prepared: ...


def bind(op: Any, values: dict[str, Any]) -> list[Any]:
    """Arguments of a torch op by name, a trailing underscore aside.

    `TypeError`: it wants one that is not known, is not optional and has no default.
    """
    bound = []
    for argument in op._schema.arguments:
        name = argument.name.rstrip("_")
        if name in values:
            bound.append(values[name])
        elif argument.has_default_value():
            bound.append(argument.default_value)
        elif "Optional" in str(argument.type):
            bound.append(None)
        else:
            raise TypeError(f"{op}: no value for {argument.name}: {argument.type}")
    return bound


@dataclass(frozen=True)
class FlashMla:
    """dense_decode_fwd; the first call of a step makes the metadata, the others reuse it."""

    name: str = "FlashMLA"

    def refusal(self, problem: MlaProblem) -> str | None:
        return None if problem.shape.cache == "bfloat16" else "dense float8 is another library"

    def prepare(self, problem: MlaProblem) -> Prepared:
        op = torch.ops._flashmla_C.dense_decode_fwd.default
        shape, kept = problem.shape, [None, None]
        q = torch.cat([problem.q_latent, problem.q_pe], -1)
        q = q.view(shape.batch, shape.q_len, shape.heads, -1)
        values = {"q": q, "head_dim_v": LATENT, "head_size_v": LATENT, "seqlens_k": problem.kv_len}
        values |= {"cache_seqlens": problem.kv_len, "block_table": problem.page_table}
        values |= {"softmax_scale": problem.scale, "is_causal": True, "causal": True}

        def call(cache: Tensor, first: bool) -> Tensor:
            paged = cache.unsqueeze(2)
            meta, splits = (None, None) if first else kept
            given = {"kcache": paged, "k_cache": paged, "num_splits": splits}
            given |= {"tile_scheduler_metadata": meta}
            out, _, kept[0], kept[1] = op(*bind(op, values | given))
            return torch.as_tensor(out).view(-1, shape.heads, LATENT)

        return [partial(call, c, i == 0) for i, c in enumerate(problem.caches)], 0.0


@dataclass(frozen=True)
class FlashAttention3:
    """fwd with the latent as values (`q_v`), heads of 64 features with position."""

    name: str = "FA3"

    def refusal(self, problem: MlaProblem) -> str | None:
        return None if problem.shape.cache == "bfloat16" else "bfloat16 only"

    def prepare(self, problem: MlaProblem) -> Prepared:
        op, shape = torch.ops._vllm_fa3_C.fwd.default, problem.shape
        values: dict[str, Any] = {
            "q": problem.q_pe,
            "q_v": problem.q_latent,
            "cu_seqlens_q": problem.q_start,
        }
        values |= {"seqused_k": problem.kv_len, "page_table": problem.page_table}
        values |= {"max_seqlen_q": shape.q_len, "max_seqlen_k": shape.kv_len, "is_causal": True}
        values |= {"softmax_scale": problem.scale, "window_size_left": -1, "window_size_right": -1}
        values |= {"softcap": 0.0, "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0}

        def call(cache: Tensor) -> Tensor:
            paged = cache.unsqueeze(2)
            given = {"k": paged[..., LATENT:], "v": paged[..., :LATENT]}
            return torch.as_tensor(op(*bind(op, values | given))[0])

        return [partial(call, c) for c in problem.caches], 0.0


@dataclass(frozen=True)
class FlashInfer:
    """BatchMLAPagedAttentionWrapper, planned on the host once a step."""

    name: str = "FlashInfer"

    def refusal(self, problem: MlaProblem) -> str | None:
        return None if problem.shape.cache == "bfloat16" else "bfloat16 only"

    def prepare(self, problem: MlaProblem) -> Prepared:
        mla, shape = importlib.import_module("flashinfer.mla"), problem.shape
        work = torch.empty(128 << 20, dtype=torch.int8, device=problem.kv_len.device)
        wrapper = mla.BatchMLAPagedAttentionWrapper(work, backend="fa3")
        counts = [-(-length // PAGE) for length in shape.lengths()]
        pages = [problem.page_table[row, :count] for row, count in enumerate(counts)]
        bounds = torch.tensor([0, *counts]).cumsum(0).int()
        start = time.perf_counter()
        wrapper.plan(
            problem.q_start.cpu(), bounds, torch.cat(pages), problem.kv_len.cpu(), shape.heads,
            LATENT, 64, PAGE, True, problem.scale, torch.bfloat16, torch.bfloat16,
        )  # fmt: skip
        torch.cuda.synchronize()
        planned = time.perf_counter() - start

        def call(cache: Tensor) -> Tensor:
            parts = cache[..., :LATENT], cache[..., LATENT:]
            return torch.as_tensor(wrapper.run(problem.q_latent, problem.q_pe, *parts))

        return [partial(call, c) for c in problem.caches], planned


@dataclass(frozen=True)
class VllmTriton:
    """vLLM's Triton decode attention, its default number of splits."""

    name: str = "vLLM Triton"

    def refusal(self, problem: MlaProblem) -> str | None:
        if problem.shape.q_len > 1:
            return "one token of a request"
        return None if problem.shape.cache == "bfloat16" else "bfloat16 only"

    def prepare(self, problem: MlaProblem) -> Prepared:
        ops = importlib.import_module("vllm.v1.attention.ops.triton_decode_attention")
        shape, splits = problem.shape, 4
        q = torch.cat([problem.q_latent, problem.q_pe], -1)
        out, lse = torch.empty_like(problem.q_latent), q.new_empty(shape.batch, shape.heads)
        size = (shape.batch, shape.heads, splits, LATENT + 1)
        logits = torch.empty(size, dtype=torch.float32, device=q.device)

        def call(cache: Tensor) -> Tensor:
            paged = cache.unsqueeze(2)
            ops.decode_attention_fwd(
                q, paged, paged[..., :LATENT], out, lse, problem.page_table, problem.kv_len,
                logits, splits, problem.scale, PAGE,
            )  # fmt: skip
            return out

        return [partial(call, c) for c in problem.caches], 0.0


LIBRARIES: dict[str, Peer] = {"_flashmla_C": FlashMla(), "_vllm_fa3_C": FlashAttention3()}
PACKAGES: dict[str, Peer] = {
    "flashinfer.mla": FlashInfer(),
    "vllm.v1.attention.ops.triton_decode_attention": VllmTriton(),
}


def load(folder: Path | None) -> tuple[list[Peer], dict[str, str]]:
    """(peers that loaded, why the others did not)."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    if folder is not None:
        sys.path.insert(0, str(folder))
    for name, peer in LIBRARIES.items():
        files = sorted(folder.rglob(f"{name}*.so")) if folder is not None else []
        if not files:
            missing[peer.name] = f"no {name}*.so in {folder or '--peers'}"
            continue
        try:
            torch.ops.load_library(str(files[0]))  # type: ignore[no-untyped-call]
            found.append(peer)
        except OSError as error:
            missing[peer.name] = str(error)
    for module, package_peer in PACKAGES.items():
        try:
            importlib.import_module(module)
            found.append(package_peer)
        except Exception as error:  # a foreign package: whatever it raises is a reason
            missing[package_peer.name] = f"{type(error).__name__}: {error}"
    return found, missing
