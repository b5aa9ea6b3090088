# SPDX-License-Identifier: MIT
"""Which implementation of an op runs: declared needs, a choice at layer build, and the reasons.

Refuses to know what any op computes. Capability decides first, then measured times
(`kernels/table.py`), then priority. Ops and backends are loaded on the first question, never at
import (`kernels/plugins.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenspeed.kernels.backend import Ask, Backend, Kernel, Op, Pack, Verdict
from tokenspeed.kernels.call_check import checked
from tokenspeed.kernels.plugins import GPU_BACKENDS, Sources
from tokenspeed.kernels.table import REFERENCE, Dispatcher, Pick, pick
from tokenspeed.kernels.table_files import Tables

__all__ = [
    "EVERY_OP",
    "REFERENCE",
    "REGISTRY",
    "Ask",
    "Backend",
    "Kernel",
    "Op",
    "Pack",
    "Registry",
    "Verdict",
    "define",
    "explain",
    "force_backend",
    "force_backends",
    "forced_by",
    "pack_of",
    "record_asks",
    "register",
    "select",
]
EVERY_OP = "*"

_forced: ContextVar[Mapping[str, str] | None] = ContextVar("forced_backends", default=None)
_asked: ContextVar["list[Ask] | None"] = ContextVar("asked", default=None)


@dataclass
class Registry:
    """Ops and backends. Loads its sources once, when first asked."""

    ops: dict[str, Op] = field(default_factory=dict)
    backends: dict[str, dict[str, Backend]] = field(default_factory=dict)
    packs: dict[int, Pack | None] = field(default_factory=dict)  # by the kernel's id
    sources: Sources = field(default_factory=Sources)
    tables: Tables = field(default_factory=Tables)

    @property
    def problems(self) -> dict[str, str]:
        """Sources that did not load, and why."""
        return self.sources.problems

    def define(self, name: str, call: str, reference: Kernel) -> Op:
        """Adds an op and its reference, which serves every device and dtype.

        The backend `reference` checks its arguments against `call` (`kernels/call_check.py`).
        """
        if name in self.ops:
            raise ValueError(f"op {name} is defined twice")
        self.ops[name] = Op(name, call, reference)
        self._add(Backend(name, REFERENCE, checked(name, call, reference), priority=-1))
        return self.ops[name]

    def register(
        self,
        op: str,
        backend: str,
        kernel: Kernel,
        *,
        devices: Sequence[str] | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
        requires: Callable[[Ask], str | None] | None = None,
        priority: int = 0,
        archs: Sequence[str] | None = None,
        pack: Pack | None = None,
    ) -> None:
        """Adds an implementation of `op`, which may be defined later. `ValueError`: a duplicate."""
        if not callable(kernel):
            raise ValueError(f"backend {backend} of {op}: {kernel!r} is not callable")
        limits = (_frozen(devices), _frozen(dtypes), requires, priority, _frozen(archs), pack)
        self._add(Backend(op, backend, kernel, *limits))

    def documented(self, op: str, kernel: Kernel) -> Kernel:
        """`kernel` behind a check of the op's documented call, for one that looks at no argument.

        `ValueError` of the result: an argument's shape, dtype or device, or an index with gaps.
        """
        self.load(gpu=False)
        return checked(op, self.ops[op].call, kernel, on_gpu=True)

    def _add(self, backend: Backend) -> None:
        of_op = self.backends.setdefault(backend.op, {})
        if backend.name in of_op:
            raise ValueError(f"backend {backend.name} of {backend.op} is registered twice")
        if self.packs.setdefault(id(backend.kernel), backend.pack) is not backend.pack:
            raise ValueError(f"{backend.name} of {backend.op}: its kernel has another pack already")
        of_op[backend.name] = backend

    def load(self, *, gpu: bool = True) -> None:
        """Imports the kernel modules and every plug-in. Later calls do nothing."""
        self.sources.load(self.register, gpu=gpu)

    def explain(self, ask: Ask, backend: str | None = None) -> list[Verdict]:
        """Every backend of the op, the preferred first, with the reason. `ValueError`: unknown op.

        `backend` (or an enclosing `force_backend`) admits one backend only.
        """
        self.load()
        return self._judge(ask, backend)[0]

    def select(self, ask: Ask, backend: str | None = None) -> Kernel:
        """The kernel of the chosen backend. `ValueError`: none can serve, with all the reasons."""
        self.load(gpu=ask.device == "cuda" or _forced_for(ask.op, backend) in GPU_BACKENDS)
        verdicts, kernel = self._judge(ask, backend)
        if kernel is None:
            reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts)
            raise ValueError(f"no backend serves {ask}: {reasons}")
        return kernel

    def _judge(self, ask: Ask, backend: str | None) -> tuple[list[Verdict], Kernel | None]:
        found = self.of(ask.op)
        forced = _forced_for(ask.op, backend)
        refusals: dict[str, str] = {}
        for candidate in found:
            refusal = candidate.refusal(ask)
            if refusal is None and forced not in (None, candidate.name):
                refusal = f"{forced} is forced"
            if refusal is not None:
                refusals[candidate.name] = refusal
        able = {b.name: b for b in found if b.name not in refusals}
        sized = ask.op, ask.device, ask.arch, ask.dtype, ask.shapes
        times = self.tables.times(*sized) if len(able) > 1 else {}
        layouts = {name: b.pack for name, b in able.items()}
        choice = pick(layouts, times, by_tokens=self.ops[ask.op].by_tokens)
        reasons = refusals | {name: choice.reason(name) for name in able}
        taken = choice.backends()
        verdicts = [Verdict(b.name, b.name in taken, reasons[b.name]) for b in found]
        return verdicts, self._kernel(ask, able, choice)

    def _kernel(self, ask: Ask, able: Mapping[str, Backend], choice: Pick) -> Kernel | None:
        kernels = [(first, able[name].kernel) for first, name in choice.ranges]
        if len(kernels) > 1:
            return Dispatcher(kernels, able[choice.ranges[0][1]].pack)
        return kernels[0][1] if kernels else None

    def of(self, op: str) -> list[Backend]:
        """The op's backends, the preferred first. `ValueError`: unknown op."""
        if op not in self.ops:
            raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(self.ops))}")
        return sorted(self.backends[op].values(), key=lambda b: -b.priority)

    def pack_of(self, kernel: Kernel) -> Pack | None:
        """The hook that packs weights for a selected kernel; None: it takes them as they are."""
        if isinstance(kernel, Dispatcher):
            return kernel.pack
        return self.packs.get(id(kernel))


REGISTRY = Registry()
define = REGISTRY.define
register = REGISTRY.register
pack_of = REGISTRY.pack_of


def _frozen(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _forced_for(op: str, backend: str | None) -> str | None:
    forced = _forced.get() or {}
    return backend or forced.get(op) or forced.get(EVERY_OP)


@contextmanager
def force_backend(backend: str, *ops: str) -> Iterator[None]:
    """Every `select` inside (of these ops, if any are given) takes this backend or raises."""
    with force_backends(dict.fromkeys(ops or (EVERY_OP,), backend)):
        yield


@contextmanager
def force_backends(by_op: Mapping[str, str]) -> Iterator[None]:
    """As `force_backend`, a backend for each op. What an enclosing call forces stays forced."""
    token = _forced.set({**(_forced.get() or {}), **by_op})
    try:
        yield
    finally:
        _forced.reset(token)


def forced_by(options: Sequence[str]) -> dict[str, str]:
    """`OP=BACKEND` texts by op; the op * is every op. `ValueError`: no such op or backend."""
    if not options:
        return {}
    REGISTRY.load()
    forced: dict[str, str] = {}
    for text in options:
        op, _, backend = text.partition("=")
        ops = REGISTRY.ops if op == EVERY_OP else {op: None}
        names = sorted({b.name for each in ops for b in REGISTRY.of(each)})
        if backend not in names:
            raise ValueError(f"kernel_backend {text!r}: {op} has the backends {', '.join(names)}")
        forced[op] = backend
    return forced


@contextmanager
def record_asks() -> Iterator[list[Ask]]:
    """Collects what is asked of `select` inside."""
    asks: list[Ask] = []
    token = _asked.set(asks)
    try:
        yield asks
    finally:
        _asked.reset(token)


def select(
    op: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    **shapes: int,
) -> Kernel:
    """The callable a layer keeps. `shapes` are the op's fixed sizes, such as head_dim=128.

    Raises `ValueError` for an unknown op, or if no backend (or not the forced one) can serve.
    """
    ask = Ask(op, torch.device(device).type, dtype, shapes)
    asked = _asked.get()
    if asked is not None:
        asked.append(ask)
    return REGISTRY.select(ask, backend)


def explain(
    op: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    arch: str = "",
    **shapes: int,
) -> list[Verdict]:
    """Why `select` with the same arguments takes what it takes; `arch`: as if on that device."""
    return REGISTRY.explain(Ask(op, torch.device(device).type, dtype, shapes, arch), backend)
