# SPDX-License-Identifier: MIT
"""Recorders: run a function once and give what runs the same kernels again, on the same memory.

    graph = recorder.capture(body)   # body runs now, and its results are graph.outputs
    graph.replay()                   # the kernels again: inputs are read anew, outputs rewritten

Refuse to know what the body computes. Outputs last until another graph of the recorder runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Outputs = tuple[Tensor, ...]


class NotCapturableError(Exception):
    """The body did something that a replay would miss. Its message names it."""


@dataclass(frozen=True)
class Graph:
    """A captured body."""

    replay: Callable[[], None]
    outputs: Outputs


class Recorder(Protocol):
    """`is_checked`: a replay's bits must be those of the body, and are compared before use."""

    is_checked: bool

    def capture(self, body: Callable[[], Outputs]) -> Graph:
        """`NotCapturableError`: nothing is kept, and the body may have run in part."""


class CpuRecorder:
    """Records the calls of the compiled CPU kernels (csrc/cpu/recording.h)."""

    is_checked = True

    def __init__(self) -> None:
        from tokenspeed import _cpu

        self._make, self._arena = _cpu.Recording, _cpu.Arena()

    @property
    def num_bytes(self) -> int:
        """Bytes that the results of all graphs take."""
        return int(self._arena.num_bytes)

    def capture(self, body: Callable[[], Outputs]) -> Graph:
        recording = self._make(self._arena)
        with recording, _OnlyViews():  # type: ignore[no-untyped-call]
            outputs = body()
        try:
            for output in outputs:
                self._arena.share(output)
        except ValueError:
            raise NotCapturableError("its result is not a kernel's") from None
        return Graph(recording.replay, outputs)


class CudaRecorder:
    """CUDA graphs whose memory is one pool. The body runs once before, for what loads lazily."""

    is_checked = False  # sums may be taken in another order at each run

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], Outputs]) -> Graph:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            body()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = body()
        except RuntimeError as error:
            raise NotCapturableError(str(error)) from error
        graph.replay()  # capturing computes nothing
        return Graph(graph.replay, outputs)


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every torch op that computes or allocates: only kernels are recorded."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to skip it: a second, at the first view

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with self:  # what is made of other ops may copy although its schema speaks of a view
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if not _is_view(func):
            raise NotCapturableError(f"{func} is no kernel of this backend")
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether the op's results are views of its arguments, and it writes nothing."""
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    results = [result.alias_info for result in schema.returns]
    if any(alias is not None and alias.is_write for alias in aliases):
        return False
    return bool(results) and all(result is not None for result in results)
