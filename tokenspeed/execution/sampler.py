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

from tokenspeed.execution.forced import ForcedOutputs
from tokenspeed.execution.grammars import GrammarRows
from tokenspeed.execution.logit_edits import LogitEdits
from tokenspeed.execution.logprobs import LogprobsReader
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs
from tokenspeed.kernels.registry import select

GREEDY_BELOW = 1e-5  # temperatures that would overflow float32 logits
LEAST_TOP_P = 1e-6  # float32 must not round it to 0
NO_PENALTIES = (1.0, 0.0, 0.0)
MAX_GATHERED = 64  # batches whose parameters are kept in order


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
        """Counts the ids [B] of these slots; -1 is none."""
        self.output_count[slots, ids.clamp(min=0)] += (ids >= 0).int()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came out of the places of a step at which ids were sampled, L of them in R rows."""

    ids: torch.Tensor  # [L] int64; -1: none came of the place, or nobody looked
    counts: torch.Tensor | None  # [R] int32: leading ids that a row keeps; None: no row verified
    logprobs: dict[int, list[TokenLogprobs]]  # by row, of the ids it keeps, where wanted


class Sampler:
    """Samples the rows of a step. One per runner; used by the thread that runs the steps."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (max_num_seqs, vocab_size), device
        kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
        self._parameters = [torch.zeros(max_num_seqs, dtype=k, device=device) for k in kinds]
        self._gathered: dict[bytes, list[torch.Tensor]] = {}
        self._edits: dict[int, LogitEdits] = {}
        self._num_logprobs: dict[int, int] = {}
        self._penalised: set[int] = set()
        self._penalties: Penalties | None = None
        self.grammars = GrammarRows(vocab_size)
        self._forced = ForcedOutputs(max_num_seqs, device)
        self._kernel = select("sample", device=device)
        self._accept = select("verify", device=device)
        self._logprobs = LogprobsReader(device)

    def bind(self, slot: int, sequence: Sequence, output_ids: list[int]) -> None:
        """Gives the slot to a request that has produced `output_ids` so far."""
        params = sequence.params
        self._gathered.clear()
        values = (
            params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
            params.top_k,
            max(params.top_p, LEAST_TOP_P),
            params.min_p,
            sequence.seed,
        )
        for tensor, value in zip(self._parameters, values, strict=True):
            tensor[slot] = value
        self._forced.bind(slot, sequence.prompt_len, params.forced_output_ids)
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
            return self._next_ids(logits, slots, places), {}
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
        ids = self._next_ids(logits, slots, places)
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
            self._penalties.record(at, ids[punished])
        if raw is None:
            return ids, {}
        num_top = [self._num_logprobs[order[row]] for row in wanted]
        entries = self._logprobs.read(raw, ids[wanted].clamp(min=0), num_top)
        return ids, dict(zip(wanted, entries, strict=True))

    def draw(
        self, logits: torch.Tensor, slots: NDArray[np.int32], places: torch.Tensor
    ) -> torch.Tensor:
        """As `sample`, by temperature, top_k, top_p, min_p and noise alone; remembers nothing."""
        ids: torch.Tensor = self._kernel(logits, *self._gather(slots), places)
        return ids

    def _next_ids(
        self, logits: torch.Tensor, slots: NDArray[np.int32], places: torch.Tensor
    ) -> torch.Tensor:
        """As `draw`, but for what requests dictate."""
        ids = self.draw(logits, slots, places)
        return self._forced.impose(ids, slots, places) if self._forced else ids

    def verify(
        self,
        logits: torch.Tensor,
        slots: NDArray[np.int32],
        num_places: NDArray[np.int32],
        starts: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor,
    ) -> Sampled:
        """Samples after each of `tokens` [L], and keeps what would have been sampled without them.

        Row r of R has the next `num_places[r]` of logits [L, vocab_size] (changed in place), tokens
        and places; `starts` [R + 1] int32 says where. Its first token is known, the others are
        drafts. An id is what the same place gives in a step of its own, as noise depends on the
        position alone, and a row keeps the leading ones whose draft is the id before: there is
        nothing to correct. What a request remembers of its ids, it remembers of those it keeps.
        """
        logprobs: dict[int, list[TokenLogprobs]] = {}
        minded = self._minded(slots, num_places)
        if minded is not None:
            ids = self._place_by_place(logits, slots, num_places, tokens, places, minded, logprobs)
        else:
            ids = self._next_ids(logits, np.repeat(slots, num_places), places)
        if self._device.type == "cpu":
            counts = torch.from_numpy(kept(ids.numpy(), tokens.numpy(), num_places))
        else:
            counts = self._accept(ids, tokens, starts)
            last = ids[(starts[:-1] + counts - 1).clamp(min=0).long()]
            counts -= ((counts > 0) & (last < 0)).int()
        return Sampled(ids, counts, logprobs)

    def _minded(
        self, slots: NDArray[np.int32], num_places: NDArray[np.int32]
    ) -> NDArray[np.bool_] | None:
        """[R] rows whose ids depend on more than their logits, or more of them is told; None: no
        row's do."""
        held = (self._edits, self._num_logprobs, self._penalised, self.grammars)
        if not any(held):
            return None
        minds = [any(slot in one for one in held) for slot in slots.tolist()]
        minded: NDArray[np.bool_] = np.array(minds) & (num_places > 0)
        return minded if minded.any() else None

    def _place_by_place(
        self,
        logits: torch.Tensor,
        slots: NDArray[np.int32],
        num_places: NDArray[np.int32],
        tokens: torch.Tensor,
        places: torch.Tensor,
        minded: NDArray[np.bool_],
        logprobs: dict[int, list[TokenLogprobs]],
    ) -> torch.Tensor:
        """Ids [L], -1 where no row came. Rows that mind go on while their drafts are right, so that
        what is remembered of them never runs ahead; the others draw at all their places at once."""
        ids, first = torch.full_like(places, -1), np.cumsum(num_places) - num_places
        free = np.flatnonzero(np.repeat(~minded, num_places))
        if len(free):
            at = torch.from_numpy(free).to(self._device)
            ids[at] = self._next_ids(logits[at], np.repeat(slots, num_places)[free], places[at])
        drafts, rows, place = tokens.tolist(), np.flatnonzero(minded), 0
        while len(rows):
            index = first[rows] + place
            at = torch.from_numpy(index).to(self._device)
            ids[at], entries = self.sample(logits[at], slots[rows], places[at])
            listed = ids[at].tolist()
            for i, entry in entries.items():
                if listed[i] >= 0:
                    logprobs.setdefault(int(rows[i]), []).append(entry)
            place += 1
            goes_on = [
                place < num_places[row] and drafts[begin + 1] == token
                for row, begin, token in zip(rows, index, listed, strict=True)
            ]
            rows = rows[goes_on]
        return ids

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
        if key not in self._gathered:
            if len(self._gathered) == MAX_GATHERED:
                self._gathered.clear()
            at = torch.from_numpy(slots.astype(np.int64)).to(self._device)
            self._gathered[key] = [tensor[at] for tensor in self._parameters]
        return self._gathered[key]


def kept(
    ids: NDArray[np.int64], tokens: NDArray[np.int64], num_places: NDArray[np.int32]
) -> NDArray[np.int32]:
    """[R] what the op `verify` gives, less an id that is -1, where the host has all of it.

    A tenth of the time that as many ops on tensors take.
    """
    stops = np.empty(len(ids), np.bool_)
    np.not_equal(ids[:-1], tokens[1:], out=stops[:-1])
    ends = np.cumsum(num_places)
    rows = num_places > 0
    stops[ends[rows] - 1] = True
    at = np.flatnonzero(stops)
    first = (ends - num_places)[rows]
    last = at[np.searchsorted(at, first)]
    counts = np.zeros(len(num_places), np.int32)
    counts[rows] = last - first + (ids[last] >= 0)
    return counts
