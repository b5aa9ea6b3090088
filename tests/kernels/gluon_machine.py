# SPDX-License-Identifier: MIT
"""A CPU that runs Gluon kernels of sm_90: the kernel's own source over torch tensors.

Gluon has no interpreter. Here a kernel's functions run as plain Python: tensors without layouts,
partitions of `warp_specialize` as threads, barriers of shared memory with their phases and bytes,
TMA copies that come late and spoil their target until they do, matrix products that read their
operands at the wait. A kernel that reads too early, frees too early or never wakes fails here.
Refuses to know registers, layouts, swizzles, and barriers between the warps of one partition.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

PATIENCE_S = 30.0
Value = Any


class Pointer:
    """An address or a tensor of addresses into a tensor's memory, in elements."""

    def __init__(self, memory: Tensor, offset: Value = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Value) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def flat(self) -> Tensor:
        size = self.memory.untyped_storage().nbytes() // self.memory.element_size()
        return torch.as_strided(self.memory, (size,), (1,), 0)

    def where(self, mask: Value) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(self.offset).long() + self.memory.storage_offset()
        keep = torch.ones_like(index, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        index, keep = torch.broadcast_tensors(index, keep)
        assert ((index >= 0) & (index < len(self.flat())))[keep].all(), "an address out of bounds"
        return index, keep


class Descriptor:
    """A TMA descriptor of a 2-d tensor; reads past its end are zeros."""

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        self.base, self.block, self.layout = base, list(block), None
        size = block[0] * block[1] * base.element_size()
        self.block_type = SimpleNamespace(nbytes=size)

    def read(self, at: Sequence[Value]) -> Tensor:
        row, column = int(at[0]), int(at[1])
        assert row >= 0, "a tile before the tensor"
        part = self.base[row : row + self.block[0], column : column + self.block[1]]
        out = part.new_zeros(self.block)  # also of a tile that lies behind the tensor
        out[: part.shape[0], : part.shape[1]] = part
        return out


class Shared:
    """A view of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.layout = data, None
        self.shape, self.dtype = tuple(data.shape), data.dtype

    def index(self, at: Value) -> "Shared":
        return Shared(self.data[int(at)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.data.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> "Shared":
        return Shared(self.data.view(dtype).view(*shape))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape
        assert value.dtype == self.data.dtype
        self.data.copy_(value)

    def spoil(self) -> None:
        self.data.fill_(float("nan") if self.data.is_floating_point() else -1)


class Barrier:
    """An mbarrier: a phase ends when its arrivals and its bytes are in."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.changed = threading.Condition()

    def update(self, arrivals: int, count: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += count
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != parity, PATIENCE_S):
                raise TimeoutError("a barrier that nobody completes")


class Product:
    """An asynchronous matrix product: operands are read when it is waited for."""

    def __init__(self, a: Shared, b: Shared, acc: Value, use_acc: bool) -> None:
        assert a.shape[1] == b.shape[0]
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc

    def value(self) -> Tensor:
        before = self.acc.value() if isinstance(self.acc, Product) else self.acc
        a = self.a if isinstance(self.a, Tensor) else self.a.data
        product = a.float() @ self.b.data.float()
        assert product.shape == before.shape
        return before + product if self.use_acc else product


class Machine:
    """One program's shared memory and barriers, and the language as its functions."""

    def __init__(self, program: Sequence[int], grid: Sequence[int], delay_s: float) -> None:
        self.program, self.grid, self.delay_s = program, grid, delay_s
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.failures: list[BaseException] = []
        self.functions: dict[int, Callable[..., Any]] = {}
        self.keep: list[Tensor] = []
        self.copies: list[threading.Thread] = []
        self.fakes = self._hopper() | {"gl": self._language()}

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        memory = Shared(torch.empty(tuple(shape), dtype=dtype))
        memory.spoil()
        self.keep.append(memory.data)
        return memory

    def key(self, at: Shared) -> tuple[int, int]:
        return at.data.untyped_storage().data_ptr(), at.data.storage_offset()

    def barrier(self, at: Shared) -> Barrier:
        return self.barriers[self.key(at)]

    def init(self, at: Shared, count: int) -> None:
        self.barriers[self.key(at)] = Barrier(count)

    def copy(self, source: Descriptor, at: Sequence[Value], bar: Shared, target: Shared) -> None:
        target.spoil()
        place = [int(x) for x in at]

        def arrive() -> None:
            time.sleep(self.delay_s)
            data = source.read(place)
            target.data.copy_(data)
            self.barrier(bar).update(0, -data.numel() * data.element_size())

        self.copies.append(threading.Thread(target=self.guard, args=(arrive,), daemon=True))
        self.copies[-1].start()

    def guard(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as error:
            self.failures.append(error)

    def specialize(self, parts: Sequence[tuple[Any, Any]], *_: object) -> None:
        threads = [
            threading.Thread(target=self.guard, args=(f, *arguments), daemon=True)
            for f, arguments in parts
        ]
        for thread in threads:
            thread.start()
        for thread in threads + self.copies:
            thread.join(PATIENCE_S)
        if self.failures:
            raise self.failures[0]
        assert not any(thread.is_alive() for thread in threads)

    def translate(self, function: Any) -> Callable[..., Any]:
        """The same code over this machine's names."""
        plain = function.fn
        if id(plain) not in self.functions:
            names: dict[str, Any] = {}
            made = FunctionType(
                plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__
            )
            made.__kwdefaults__ = plain.__kwdefaults__
            self.functions[id(plain)] = made
            names.update({name: self.name(name, x) for name, x in plain.__globals__.items()})
        return self.functions[id(plain)]

    def name(self, name: str, value: Any) -> Any:
        if name in self.fakes:
            return self.fakes[name]
        if isinstance(value, GluonJITFunction):
            return self.translate(value)
        return getattr(value, "value", value)  # a constexpr is its value

    def _hopper(self) -> dict[str, Any]:
        nothing = lambda *_, **__: None  # noqa: E731
        hopper = {
            "fence_async_shared": nothing,
            "warpgroup_mma": _product,
            "warpgroup_mma_wait": _wait,
            "barrier": nothing,
            "fresh_zero": lambda: 0,
            "gdc_wait": nothing,
            "gdc_launch_dependents": nothing,
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
        }
        hopper["mbarrier"] = SimpleNamespace(
            init=self.init,
            wait=lambda bar, phase: self.barrier(bar).wait(int(phase)),
            expect=lambda bar, count: self.barrier(bar).update(1, count),
            arrive=lambda bar, count: self.barrier(bar).update(count, 0),
            MBarrierLayout=nothing,
        )
        return hopper

    def _language(self) -> SimpleNamespace:
        nothing = lambda *_, **__: None  # noqa: E731
        dtypes = {n: getattr(torch, n) for n in ("float32", "bfloat16", "int32", "int64", "int16")}
        made = SimpleNamespace(**dtypes, **_FUNCTIONS)
        made.program_id = lambda axis: torch.tensor(self.program[axis], dtype=torch.int32)
        made.num_programs = lambda axis: torch.tensor(self.grid[axis], dtype=torch.int32)
        made.allocate_shared_memory = self.allocate
        made.warp_specialize = self.specialize
        made.NVMMASharedLayout = _SharedLayout
        for layout in (
            "BlockedLayout",
            "DotOperandLayout",
            "SliceLayout",
            "NVMMADistributedLayout",
        ):
            setattr(made, layout, nothing)
        return made


class _SharedLayout:
    """Any layout of shared memory: all of them are the same here."""

    def __init__(self, **_: object) -> None: ...

    @staticmethod
    def get_default_for(*_: object) -> None: ...


def _product(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    made = Product(a, b, acc, use_acc)
    return made if is_async else made.value()


def _wait(_: int, deps: Sequence[Any]) -> Any:
    values = [x.value() if isinstance(x, Product) else x for x in deps]
    return values[0] if len(values) == 1 else tuple(values)


def _load(pointer: Pointer, mask: Value = None, other: Value = 0) -> Tensor:
    index, keep = pointer.where(mask)
    out = torch.full(index.shape, float(other), dtype=torch.float64).to(pointer.memory.dtype)
    out[keep] = pointer.flat()[index[keep]]
    return out


def _store(pointer: Pointer, value: Tensor, mask: Value = None) -> None:
    index, keep = pointer.where(mask)
    written = torch.as_tensor(value).expand(index.shape)[keep]
    pointer.flat()[index[keep]] = written.to(pointer.memory.dtype)


def _pair(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _where(condition: Value, a: Value, b: Value) -> Tensor:
    return torch.where(torch.as_tensor(condition), a, b)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "load": _load,
    "store": _store,
    "where": _where,
    "minimum": _pair(torch.minimum),
    "maximum": _pair(torch.maximum),
    "arange": lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    "sum": lambda x, axis: x.sum(axis, dtype=x.dtype),
    "max": lambda x, axis: x.amax(axis),
    "min": lambda x, axis: x.amin(axis),
    "exp2": torch.exp2,
    "log2": torch.log2,
    "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    "associative_scan": lambda x, axis, _: x.cumsum(axis, dtype=x.dtype),
    "join": lambda a, b: torch.stack((a, b), -1),
    "static_range": range,
    "convert_layout": lambda x, layout: x,
}


def run(
    kernel: Any, grid: Sequence[int], *arguments: Any, delay_s: float = 0.0, **constants: Any
) -> None:
    """Runs every program of a grid, one after the other. Tensors are passed as pointers."""
    passed = [Pointer(a) if isinstance(a, Tensor) else a for a in arguments]
    for program in product(*map(range, grid)):
        Machine(program, grid, delay_s).translate(kernel)(*passed, **constants)
