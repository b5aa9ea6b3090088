# SPDX-License-Identifier: MIT
"""Our own kernels as subjects of the benchmark: every GPU backend of every op. No timing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.peers import Peer, Prepared
from gpu.problem import MlaProblem
from gpu.shapes import PAGE
from tokenspeed.kernels.cases.case import Inputs, OpCases
from tokenspeed.kernels.cases.catalog import all_cases
from tokenspeed.kernels.plugins import GPU_BACKENDS
from tokenspeed.kernels.registry import REGISTRY, Ask

ROTATION_BYTES = 512 << 20
TOKENS = (1, 8, 32, 512)


@dataclass(frozen=True)
class Ours:
    """A backend of `attention_mla`."""

    name: str
    refused_caches: tuple[str, ...] = ()

    def refusal(self, problem: MlaProblem) -> str | None:
        cache = problem.shape.cache
        return f"no {cache} pages" if cache in self.refused_caches else None

    def prepare(self, problem: MlaProblem) -> Prepared:
        kernel = kernel_of("attention_mla", self.name)

        def call(cache: Tensor) -> Tensor:
            q = problem.q_latent, problem.q_pe
            return torch.as_tensor(kernel(*q, cache, *problem.tables(), problem.scale))

        return [partial(call, c) for c in problem.caches], 0.0


@dataclass(frozen=True)
class Sharing:
    """`attention_mla_shared` of the Gluon backend, its groups found once a step."""

    name: str = "gluon shared"

    def refusal(self, problem: MlaProblem) -> str | None:
        return None if problem.shape.shared else "nothing is shared"

    def prepare(self, problem: MlaProblem) -> Prepared:
        find = kernel_of("prefix_groups", "gluon")
        kernel = kernel_of("attention_mla_shared", "gluon")
        kept: list[Tensor] = []

        def call(cache: Tensor, first: bool) -> Tensor:
            if first:
                kept[:] = [find(*problem.tables(), PAGE)]
            q = problem.q_latent, problem.q_pe
            return torch.as_tensor(kernel(*q, cache, *problem.tables(), problem.scale, kept[0]))

        return [partial(call, c, i == 0) for i, c in enumerate(problem.caches)], 0.0


def kernel_of(op: str, backend: str) -> Callable[..., Any]:
    """`LookupError`: the op has no such backend."""
    REGISTRY.load()
    for found in REGISTRY.of(op):
        if found.name == backend:
            return found.kernel
    raise LookupError(f"{op} has no backend {backend}")


def gpu_backends() -> Iterator[tuple[str, str]]:
    """(op, backend) of all GPU backends that this device can run."""
    REGISTRY.load()
    for op in sorted(REGISTRY.ops):
        for backend in REGISTRY.of(op):
            ask = Ask(op, "cuda", torch.bfloat16, {})
            wide = Ask(op, "cuda", torch.float32, {})
            if backend.name in GPU_BACKENDS and None in (
                backend.refusal(ask),
                backend.refusal(wide),
            ):
                yield op, backend.name


def mla_backends() -> list[Peer]:
    """Backends of `attention_mla` here, and where pages are shared, the one that knows."""
    names = [name for op, name in gpu_backends() if op == "attention_mla"]
    ours: list[Peer] = [Ours(name, () if name == "gluon" else ("float8",)) for name in names]
    return [*ours, Sharing()] if "gluon" in names else ours


@dataclass(frozen=True)
class Sized:
    """One op at the sizes of a real model, on operands that rotate."""

    op: str
    shape: str
    cases: OpCases
    calls: dict[str, list[Callable[[], object]]]  # by backend
    bytes: float
    flops: float


def sized_ops(only: str) -> Iterator[Sized]:
    """Every op that has sizes for measuring, except latent attention, which has its own shapes."""
    backends = list(gpu_backends())
    for op, cases in sorted(all_cases().items()):
        names = [name for found, name in backends if found == op]
        if only not in op or not names or cases.sized is None or cases.work is None:
            continue
        if op.startswith("attention_mla"):
            continue
        for sizes in cases.examples:
            for tokens in TOKENS:
                yield _sized(op, cases, dict(sizes), tokens, names)


def _sized(op: str, cases: OpCases, sizes: dict[str, int], tokens: int, names: list[str]) -> Sized:
    if cases.sized is None or cases.work is None:
        raise ValueError(f"{op} has no sizes for measuring")
    dtype = torch.bfloat16 if torch.bfloat16 in cases.tolerance else torch.float32
    host = cases.sized(Inputs(dtype), tokens, sizes)
    work = cases.work(host)
    copies = min(16, max(1, int(ROTATION_BYTES // max(work.bytes, 1.0))))
    arguments = [
        tuple(a.to("cuda", copy=True) if isinstance(a, Tensor) else a for a in host)
        for _ in range(copies)
    ]
    calls: dict[str, list[Callable[[], object]]] = {}
    for name in names:
        packed = [_packed(op, name, cases, each) for each in arguments]
        kernel = kernel_of(op, name)
        calls[name] = [partial(kernel, *each) for each in packed]
    label = " ".join([f"T={tokens}", *(f"{key}={value}" for key, value in sizes.items())])
    return Sized(op, label, cases, calls, work.bytes, work.flops)


def _packed(op: str, name: str, cases: OpCases, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    backend = next(b for b in REGISTRY.of(op) if b.name == name)
    if backend.pack is None:
        return arguments
    pack = backend.pack
    return tuple(pack(a) if i in cases.weights else a for i, a in enumerate(arguments))
