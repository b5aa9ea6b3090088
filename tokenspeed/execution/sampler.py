# SPDX-License-Identifier: MIT
"""`Sampler`: logits -> ids under per-slot parameters that stay on the device between steps.

`bind` resets everything a slot holds, so nothing of its last request is left; parameters are then
gathered by slot, never rebuilt. Knows slots and positions; refuses to know pages and when a request
ends.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.grammars import GrammarRows
from tokenspeed.execution.logit_edits import LogitEdits
from tokenspeed.execution.logprobs import LogprobsReader
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs
from tokenspeed.kernels.registry import select

GREEDY_BELOW = 1e-5  # temperatures that would overflow float32 logits
LEAST_TOP_P = 1e-6  # float32 must not round it to 0
NO_PENALTIES = (1.0, 0.0, 0.0)


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and how its next ones are chosen.

    `output_ids` grows at each commit. When the request is bound to a slot again (it had been
    retracted), sampler state is rebuilt from these tokens alone.
    """

    prompt_ids: NDArray[np.int32]
    params: SamplingParams
    stop_ids: list[int]
    seed: int  # the request's own, or one drawn for it; noise is a function of (seed, position)
    output_ids: list[int] = field(default_factory=list)
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None  # when a step first took it up

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)


class Penalties:
    """Which tokens each slot has seen: [max_num_seqs, vocab_size], allocated at the first use."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        shape = (max_num_seqs, vocab_size)
        self.prompt_seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self.output_count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.factors = torch.zeros((3, max_num_seqs), dtype=torch.float32, device=device)
        self._kernel = select("apply_penalties", device=device)

    def bind(self, slot: int, sequence: Sequence, output_ids: list[int]) -> None:
        device, params = self.factors.device, sequence.params
        self.prompt_seen[slot] = False
        self.prompt_seen[slot, torch.from_numpy(sequence.prompt_ids.astype(np.int64))] = True
        outputs = torch.tensor(output_ids, dtype=torch.int64, device=device)
        self.output_count[slot] = torch.bincount(outputs, minlength=self.output_count.shape[1])
        self.factors[:, slot] = torch.tensor(
            [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        )

    def apply(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        self._kernel(
            logits, slots, self.prompt_seen, self.output_count, *self.factors[:, slots].contiguous()
        )

    def record(self, slots: torch.Tensor, ids: torch.Tensor) -> None:
        self.output_count[slots, ids] += 1


class Sampler:
    """Samples the rows of a step. One per runner; used by the thread that runs the steps."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (max_num_seqs, vocab_size), device
        kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
        self._parameters = [torch.zeros(max_num_seqs, dtype=k, device=device) for k in kinds]
        self._gathered: tuple[bytes, list[torch.Tensor]] | None = None
        self._edits: dict[int, LogitEdits] = {}
        self._num_logprobs: dict[int, int] = {}
        self._penalised: set[int] = set()
        self._penalties: Penalties | None = None
        self.grammars = GrammarRows(vocab_size)
        self._kernel = select("sample", device=device)
        self._logprobs = LogprobsReader(device)

    def bind(self, slot: int, sequence: Sequence, output_ids: list[int]) -> None:
        """Gives the slot to a request that has produced `output_ids` so far."""
        params = sequence.params
        self._gathered = None
        values = (
            params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
            params.top_k,
            max(params.top_p, LEAST_TOP_P),
            params.min_p,
            sequence.seed,
        )
        for tensor, value in zip(self._parameters, values, strict=True):
            tensor[slot] = value
        for held in (self._edits, self._num_logprobs):
            held.pop(slot, None)
        self._penalised.discard(slot)
        key = None if params.grammar is None else params.grammar.key
        whole = params.top_k <= 0 and params.top_p == 1.0 and params.min_p == 0.0
        late = whole and not params.edits_logits and self._device.type == "cpu"
        self.grammars.bind(slot, key, sequence.stop_ids, output_ids, late=late)
        if params.edits_logits:
            self._edits[slot] = LogitEdits.of(
                params, sequence.prompt_len, sequence.stop_ids, output_ids, self._device
            )
        if params.logprobs is not None:
            self._num_logprobs[slot] = params.logprobs
        factors = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if factors != NO_PENALTIES:
            if self._penalties is None:
                self._penalties = Penalties(*self._shape, self._device)
            self._penalties.bind(slot, sequence, output_ids)
            self._penalised.add(slot)

    def sample(
        self, logits: torch.Tensor, slots: NDArray[np.int32], places: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, TokenLogprobs]]:
        """logits [B, vocab_size] float32, changed in place -> ids [B] int64 (-1: not finite).

        `places` [B] int64 are the positions of the sampled tokens. The dict gives the
        log-probabilities of the rows whose request wants them.
        """
        grammars = self.grammars
        if not (self._num_logprobs or self._edits or self._penalised or grammars):
            return self._kernel(logits, *self._gather(slots), places), {}
        order = slots.tolist()
        wanted = [row for row, slot in enumerate(order) if slot in self._num_logprobs]
        edited = [row for row, slot in enumerate(order) if slot in self._edits]
        punished = [row for row, slot in enumerate(order) if slot in self._penalised]
        raw = logits[wanted] if wanted else None  # a copy: what follows works in place
        for row in edited:
            self._edits[order[row]].apply(logits[row], int(places[row]))
        if grammars:
            grammars.mask(logits, order)
            grammars.may_end(logits, order, edited)
        if punished:
            self._penalise(logits, punished, slots)
        ids: torch.Tensor = self._kernel(logits, *self._gather(slots), places)
        for row in edited:
            self._edits[order[row]].record(int(ids[row]))
        if grammars:
            again = grammars.again(logits, order, ids)
            if again:
                at = torch.from_numpy(slots[again].astype(np.int64))
                chosen = [tensor[at] for tensor in self._parameters]
                ids[again] = self._kernel(logits[again], *chosen, places[again])
            grammars.record(order, ids, again)
        if punished and self._penalties is not None:
            at = torch.from_numpy(slots[punished].astype(np.int64)).to(self._device)
            self._penalties.record(at, ids[punished].clamp(min=0))
        if raw is None:
            return ids, {}
        num_top = [self._num_logprobs[order[row]] for row in wanted]
        entries = self._logprobs.read(raw, ids[wanted].clamp(min=0), num_top)
        return ids, dict(zip(wanted, entries, strict=True))

    def _penalise(self, logits: torch.Tensor, rows: list[int], slots: NDArray[np.int32]) -> None:
        penalties = self._penalties
        if penalties is None:
            raise RuntimeError("a slot is penalised, but no penalties were ever bound")
        at = torch.from_numpy(slots[rows].astype(np.int64)).to(self._device)
        if len(rows) == len(logits):
            penalties.apply(logits, at)
            return
        some = logits[rows]
        penalties.apply(some, at)
        logits[rows] = some

    def _gather(self, slots: NDArray[np.int32]) -> list[torch.Tensor]:
        """The parameters of these slots; kept while the same slots run with the same requests."""
        key = slots.tobytes()
        if self._gathered is None or self._gathered[0] != key:
            at = torch.from_numpy(slots.astype(np.int64)).to(self._device)
            self._gathered = key, [tensor[at] for tensor in self._parameters]
        return self._gathered[1]
