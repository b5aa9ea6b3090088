# SPDX-License-Identifier: MIT
"""Which implementation of an op runs: declared needs, a choice at layer build, and the reasons.

Refuses to know what any op computes. Built-in modules of this package and third-party packages
(entry-point group `tokenspeed.kernels`) are loaded on the first question, never at import; one that
fails to load is reported by `explain`, it stops nobody.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

Kernel = Callable[..., Any]
ENTRY_POINT_GROUP = "tokenspeed.kernels"
REFERENCE = "reference"

_forced: ContextVar[str | None] = ContextVar("forced_backend", default=None)


@dataclass(frozen=True)
class Op:
    """An operation: its name, its call with documented shapes, and the plain torch reference."""

    name: str
    call: str
    reference: Kernel


@dataclass(frozen=True)
class Ask:
    """What a layer asks for: an op on a device, in the dtype of its activations, for shapes."""

    op: str
    device: str
    dtype: torch.dtype
    shapes: Mapping[str, int]


@dataclass(frozen=True)
class Backend:
    """One implementation. `requires` returns why it cannot serve an `Ask`, or None if it can."""

    op: str
    name: str
    kernel: Kernel
    devices: tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] | None = None
    requires: Callable[[Ask], str | None] | None = None
    priority: int = 0  # the highest that can serve is taken; the reference has -1

    def refusal(self, ask: Ask) -> str | None:
        if self.devices is not None and ask.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {ask.device}"
        if self.dtypes is not None and ask.dtype not in self.dtypes:
            return f"does not take {ask.dtype}"
        return self.requires(ask) if self.requires is not None else None


@dataclass(frozen=True)
class Verdict:
    """Why a backend was taken or not."""

    backend: str
    chosen: bool
    reason: str


@dataclass
class Registry:
    """Ops and backends. Loads its sources once, when first asked."""

    ops: dict[str, Op] = field(default_factory=dict)
    backends: dict[str, dict[str, Backend]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # source -> why it did not load
    loaded: bool = False

    def define(self, name: str, call: str, reference: Kernel) -> Op:
        """Adds an op and its reference, which serves every device and dtype."""
        if name in self.ops:
            raise ValueError(f"op {name} is defined twice")
        self.ops[name] = Op(name, call, reference)
        self._add(Backend(name, REFERENCE, reference, priority=-1))
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
    ) -> None:
        """Adds an implementation of `op`, which may be defined later. `ValueError`: a duplicate."""
        limits = (
            None if devices is None else tuple(devices),
            None if dtypes is None else tuple(dtypes),
        )
        self._add(Backend(op, backend, kernel, *limits, requires, priority))

    def _add(self, backend: Backend) -> None:
        of_op = self.backends.setdefault(backend.op, {})
        if backend.name in of_op:
            raise ValueError(f"backend {backend.name} of {backend.op} is registered twice")
        of_op[backend.name] = backend

    def load(self) -> None:
        """Imports the package's kernel modules, then every plug-in. Later calls do nothing."""
        if self.loaded:
            return
        self.loaded = True
        package = importlib.import_module("tokenspeed.kernels")
        for module in pkgutil.iter_modules(package.__path__, "tokenspeed.kernels."):
            self._try(module.name, partial(importlib.import_module, module.name))
        for plugin in entry_points(group=ENTRY_POINT_GROUP):
            self._try(f"plug-in {plugin.name}", partial(self._plug_in, plugin))

    def _plug_in(self, plugin: EntryPoint) -> None:
        plugin.load()(self.register)

    def _try(self, source: str, load: Callable[[], object]) -> None:
        # A plug-in is foreign code: whatever it raises is its own report, not our crash.
        try:
            load()
        except Exception as error:
            self.problems[source] = f"{type(error).__name__}: {error}"

    def explain(self, ask: Ask, backend: str | None = None) -> list[Verdict]:
        """Every backend of the op, the preferred first, with the reason. `ValueError`: unknown op.

        `backend` (or an enclosing `force_backend`) admits one backend only.
        """
        self.load()
        if ask.op not in self.ops:
            raise ValueError(f"unknown op {ask.op!r}; known: {', '.join(sorted(self.ops))}")
        forced = backend or _forced.get()
        verdicts: list[Verdict] = []
        taken: str | None = None
        for candidate in sorted(self.backends[ask.op].values(), key=lambda b: -b.priority):
            refusal = candidate.refusal(ask)
            if refusal is None and forced not in (None, candidate.name):
                refusal = f"{forced} is forced"
            if refusal is None and taken is not None:
                refusal = f"{taken} comes first"
            if refusal is None:
                taken = candidate.name
            verdicts.append(Verdict(candidate.name, refusal is None, refusal or "serves the ask"))
        return verdicts

    def select(self, ask: Ask, backend: str | None = None) -> Kernel:
        """The kernel of the chosen backend. `ValueError`: none can serve, with all the reasons."""
        verdicts = self.explain(ask, backend)
        for verdict in verdicts:
            if verdict.chosen:
                return self.backends[ask.op][verdict.backend].kernel
        reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdicts)
        raise ValueError(f"no backend serves {ask}: {reasons}")


REGISTRY = Registry()
define = REGISTRY.define
register = REGISTRY.register


@contextmanager
def force_backend(backend: str) -> Iterator[None]:
    """Every `select` inside takes this backend or raises. For tests and comparisons."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


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
    return REGISTRY.select(Ask(op, torch.device(device).type, dtype, shapes), backend)


def explain(
    op: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    **shapes: int,
) -> list[Verdict]:
    """Why `select` with the same arguments takes what it takes."""
    return REGISTRY.explain(Ask(op, torch.device(device).type, dtype, shapes), backend)
