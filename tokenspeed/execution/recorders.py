# SPDX-License-Identifier: MIT
"""Recorders: run a function once and give what runs the same kernels again, on the same memory.

    graph = recorder.capture(body, num_tokens, num_rows)  # body runs now: graph.outputs
    outputs = graph.replay(num_tokens, num_rows)          # the kernels again: inputs are read anew

A step of another size, where the graph serves it, reads more or less of the same memory. Refuse to
know what the body computes. Outputs last until another graph of the recorder runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from tokenspeed._cpu import Recording

Outputs = tuple[Tensor, ...]
LEAST_ROOM: Final = 16  # tokens of steps that a captured one serves, on a CPU, and else up to twice


class NotCapturableError(Exception):
    """The body did something that a replay would miss. Its message names it."""


class Graph(Protocol):
    """A captured body."""

    @property
    def outputs(self) -> Outputs:
        """Those of the step that was captured."""

    def serves(self, num_tokens: int, num_rows: int) -> bool:
        """Whether it can be replayed for a step of this size."""

    def replay(self, num_tokens: int, num_rows: int) -> Outputs:
        """REQUIRES: `serves` says so."""


class Recorder(Protocol):
    """`is_checked`: a replay's bits must be those of the body, and are compared before use."""

    is_checked: bool

    def capture(self, body: Callable[[], Outputs], num_tokens: int, num_rows: int) -> Graph:
        """Of a step of so many tokens, which stand on the first axis of all that the body makes.

        `NotCapturableError`: nothing is kept, and the body may have run in part.
        """


class CpuGraph:
    """A graph of compiled CPU kernels: any number of rows, and of tokens up to the room it has."""

    def __init__(
        self, recording: "Recording", outputs: Outputs, num_tokens: int, num_rows: int
    ) -> None:
        self.outputs = outputs
        self._recording, self._size = recording, (num_tokens, num_rows)
        self._room = 0 if recording.is_fixed else recording.room
        self._whole = outputs
        if self._room:
            self._whole = tuple(recording.with_room(output) for output in outputs)
        self._views: dict[int, Outputs] = {num_tokens: outputs}  # by number of tokens

    def serves(self, num_tokens: int, num_rows: int) -> bool:
        return 0 < num_tokens <= self._room or (num_tokens, num_rows) == self._size

    def replay(self, num_tokens: int, num_rows: int) -> Outputs:
        self._recording.replay(num_tokens, num_rows)
        views = self._views.get(num_tokens)
        if views is None:
            views = tuple(output[:num_tokens] for output in self._whole)
            self._views[num_tokens] = views
        return views


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

    def capture(self, body: Callable[[], Outputs], num_tokens: int, num_rows: int) -> CpuGraph:
        room = max(LEAST_ROOM, 1 << (num_tokens - 1).bit_length())
        recording = self._make(self._arena, num_tokens, num_rows, room)
        with recording, _OnlyViews():  # type: ignore[no-untyped-call]
            outputs = body()
        try:
            for output in outputs:
                self._arena.share(output)
        except ValueError:
            raise NotCapturableError("its result is not a kernel's") from None
        return CpuGraph(recording, outputs, num_tokens, num_rows)


@dataclass(frozen=True)
class CudaGraph:
    """Serves the size that was captured alone."""

    graph: torch.cuda.CUDAGraph
    outputs: Outputs
    num_tokens: int
    num_rows: int

    def serves(self, num_tokens: int, num_rows: int) -> bool:
        return (num_tokens, num_rows) == (self.num_tokens, self.num_rows)

    def replay(self, num_tokens: int, num_rows: int) -> Outputs:
        self.graph.replay()
        return self.outputs


class CudaRecorder:
    """CUDA graphs whose memory is one pool. The body runs once before, for what loads lazily."""

    is_checked = False  # sums may be taken in another order at each run

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], Outputs], num_tokens: int, num_rows: int) -> CudaGraph:
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
        return CudaGraph(graph, outputs, num_tokens, num_rows)


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
