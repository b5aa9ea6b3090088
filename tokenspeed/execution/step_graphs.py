# SPDX-License-Identifier: MIT
"""`StepGraphs`: steps captured once for each number of rows and tokens, and replayed.

A captured step runs the kernels that the model ran, without the model's Python. Captured are steps
in which every row samples after each of its tokens: after its one token, or after a token and the
drafts behind it; their memory stays where it is (`execution/batch.py`). On a CPU each number of
rows and tokens is captured when it first comes; elsewhere some sizes of steps of one token a
row are, beforehand, and steps are filled up to them.

What a replay would miss is found in two ways: the recorder refuses what it cannot record, and the
second step of a size is computed both ways and compared bit by bit: of each of the first
`SURE_AFTER` sizes, then of one in `SAMPLE`. A model that fails either runs without graphs from then
on; the log says why. Knows no plans.
"""

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenspeed.execution.recorders import Graph, NotCapturableError, Outputs, Recorder
from tokenspeed.layers.batch import ForwardBatch

_log = logging.getLogger(__name__)
MAX_GRAPHS = 256
SURE_AFTER, SAMPLE = 24, 8

Compute = Callable[[ForwardBatch], Outputs]


@dataclass(slots=True)
class _Captured:
    graph: Graph
    batch: ForwardBatch  # whose memory the graph reads
    is_trusted: bool


class StepGraphs:
    """`compute` gives hidden states [T, hidden], logits [T, vocab], perhaps more, of T tokens.

    `sizes` are the numbers of rows to capture, rising, with one token each; empty: any number up to
    `max_rows`, of any number of tokens.
    """

    def __init__(
        self, compute: Compute, recorder: Recorder, *, max_rows: int, sizes: Sequence[int] = ()
    ) -> None:
        self._compute, self._recorder = compute, recorder
        self._sizes, self._max_rows = tuple(sizes), sizes[-1] if sizes else max_rows
        self._captured: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self.num_replays = self._num_captured = 0

    def size_for(self, num_rows: int, num_tokens: int) -> int | None:
        """How many rows such a step is filled up to; None: it is not to be captured."""
        if num_rows > self._max_rows:
            return None
        if num_tokens > num_rows:
            return None if self._sizes else num_rows
        return self._sizes[bisect_left(self._sizes, num_rows)] if self._sizes else num_rows

    def run(self, batch: ForwardBatch) -> Outputs:
        """What `compute` gives, for a batch of one of the sizes; valid until the next call."""
        key = len(batch.slots), len(batch.token_ids)
        found = self._captured.get(key)
        if found is None:
            return self._capture(key, batch)
        self._captured.move_to_end(key)
        self.num_replays += 1
        found.graph.replay()
        return found.graph.outputs if found.is_trusted else self._check(found)

    def _capture(self, key: tuple[int, int], batch: ForwardBatch) -> Outputs:
        try:
            graph = self._recorder.capture(lambda: self._compute(batch))
        except NotCapturableError as error:
            self._give_up(str(error))
            return self._compute(batch)
        if len(self._captured) == MAX_GRAPHS:
            self._captured.popitem(last=False)
        self._num_captured += 1
        known = self._num_captured > SURE_AFTER and self._num_captured % SAMPLE != 0
        trusted = known or not self._recorder.is_checked
        self._captured[key] = _Captured(graph, batch, trusted)
        return graph.outputs

    def _check(self, captured: _Captured) -> Outputs:
        """After a replay: computes the same step as if there were no graph, and compares."""
        outputs = self._compute(captured.batch)
        captured.is_trusted = all(
            _same_bits(a, b) for a, b in zip(captured.graph.outputs, outputs, strict=True)
        )
        if not captured.is_trusted:
            self._give_up("a replay gave other numbers than the model")
        return outputs

    def _give_up(self, why: str) -> None:
        _log.warning("decode steps run without graphs: %s", why)
        self._captured.clear()
        self._max_rows = 0


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
