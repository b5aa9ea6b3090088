# SPDX-License-Identifier: MIT
"""`StepGraphs`: captured steps, replayed without the model's Python.

Captured are steps in which every row samples after each of its tokens: after its one token, or
after a token and the drafts behind it; their memory stays where it is (`execution/batch.py`). On a
CPU a captured step serves others of more or fewer rows and tokens, so there are two or three of
either kind; elsewhere some sizes of steps of one token a row are captured beforehand, and steps are
filled up to them.

What a replay would miss is found in two ways: the recorder refuses what it cannot record, and the
first replays of `SURE_AFTER` sizes, then of one size in `SAMPLE`, are computed both ways and
compared bit by bit. A model that fails either runs without graphs from then on; the log says why.
Knows no plans.
"""

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenspeed.execution.recorders import Graph, NotCapturableError, Outputs, Recorder
from tokenspeed.layers.batch import ForwardBatch

_log = logging.getLogger(__name__)
MAX_GRAPHS = 256
SURE_AFTER, SAMPLE = 8, 32

Compute = Callable[[ForwardBatch], Outputs]
_Key = tuple[int, int]


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
        self._widest: dict[bool, Graph] = {}  # of steps of one token a row, and of others
        self._captured: OrderedDict[_Key, Graph] = OrderedDict()  # by tokens and rows
        self._replayed: set[_Key] = set()
        self.num_replays = self.num_captured = 0
        self.num_slow = 0  # runs that took longer than others like them will

    def size_for(self, num_rows: int, num_tokens: int) -> int | None:
        """How many rows such a step is filled up to; None: it is not to be captured."""
        if num_rows > self._max_rows:
            return None
        if num_tokens > num_rows:
            return None if self._sizes else num_rows
        return self._sizes[bisect_left(self._sizes, num_rows)] if self._sizes else num_rows

    def run(self, batch: ForwardBatch) -> Outputs:
        """What `compute` gives, for a batch of one of the sizes; valid until the next call."""
        size = num_tokens, num_rows = len(batch.token_ids), len(batch.slots)
        graph = self._widest.get(num_tokens == num_rows)
        if graph is None or not graph.serves(num_tokens, num_rows):
            graph = self._captured.get(size)
            if graph is None:
                self.num_slow += 1
                return self._capture(size, batch)
            self._captured.move_to_end(size)
        self.num_replays += 1
        outputs = graph.replay(num_tokens, num_rows)
        if size in self._replayed or not self._recorder.is_checked:
            return outputs
        self._replayed.add(size)
        known = len(self._replayed) > SURE_AFTER and len(self._replayed) % SAMPLE != 0
        return outputs if known else self._check(outputs, batch)

    def _capture(self, size: _Key, batch: ForwardBatch) -> Outputs:
        num_tokens, num_rows = size
        try:
            graph = self._recorder.capture(lambda: self._compute(batch), num_tokens, num_rows)
        except NotCapturableError as error:
            self._give_up(str(error))
            return self._compute(batch)
        self.num_captured += 1
        if graph.serves(num_tokens, num_rows + 1):
            self._widest[num_tokens == num_rows] = graph
            return graph.outputs
        if len(self._captured) == MAX_GRAPHS:
            self._captured.popitem(last=False)
        self._captured[size] = graph
        return graph.outputs

    def _check(self, replayed: Outputs, batch: ForwardBatch) -> Outputs:
        """After a replay: computes the same step as if there were no graph, and compares."""
        self.num_slow += 1
        outputs = self._compute(batch)
        if not all(map(_same_bits, replayed, outputs)):
            self._give_up("a replay gave other numbers than the model")
        return outputs

    def _give_up(self, why: str) -> None:
        _log.warning("decode steps run without graphs: %s", why)
        self._captured.clear()
        self._widest.clear()
        self._max_rows = 0


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
