# SPDX-License-Identifier: MIT
"""`ChainDrafter`: what drafters with weights of their own share, whatever they compute.

Each place of a sequence is fed once, when its tokens are settled; the last one gives the first
draft, and drafts are fed behind it, one by one, for the next ones. A head (`shift` 1) is fed what
the model left at a place and the token behind it, a whole model (`shift` 0) the place's own token:

    settled places        s ... e - 1      row's tokens; the one at e is known, and not computed yet
    head is fed           (left[s], token[s + 1]) ... (left[e - 1], token[e])      -> draft at e + 1
    then, at e            (left by itself at e - 1, draft)                         -> draft at e + 2

Keys and values go to the model's own pages, as far as it has any; behind them a chain writes to
pages of its own, of which only its slot knows. Places of rows that want no draft wait, up to
`BACKLOG` of them: a drafter that is not asked costs little, and after `SLEEPS_AFTER` steps nothing:
then it misses what goes by until somebody asks. Plans say who asks, so it is alike on all ranks.
Knows no architecture.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.execution.recorders import Recorder
from tokenspeed.execution.speculation.backlog import Backlog, Ints
from tokenspeed.execution.speculation.draft_pages import DraftPages
from tokenspeed.execution.speculation.draft_rows import DraftRows, PassedStep, ragged
from tokenspeed.execution.speculation.drafter import DraftWork
from tokenspeed.execution.speculation.feeder import Caches, DraftNet, Fed, Feeder
from tokenspeed.layers.cache_spec import CacheSpec

BACKLOG: Final = 32  # places kept of each slot
LEAST_LATER: Final = 1024  # tokens of steps that are put off
SLEEPS_AFTER: Final = 20  # steps of which nobody wants drafts: more than a nap to measure has


@dataclass(frozen=True)
class Room:
    """What an engine has room for: requests, tokens of each, tokens of a page."""

    max_num_seqs: int
    max_model_len: int
    page_size: int


@dataclass(frozen=True)
class Places:
    """Ids [n] to feed, and what stands beside them, [n, W]."""

    ids: Tensor
    beside: Tensor

    def take(self, index: Ints) -> "Places":
        """Those at `index`, which names none twice; all of them only in another order."""
        at = torch.from_numpy(index).to(self.ids.device)
        return Places(self.ids[at], self.beside[at])


class ChainDrafter:
    """Drafts with `net`, whose layers keep `cache_specs`. A `ModelDrafter` once it is attached.

    `complete`: nothing is forgotten, it never sleeps, and full pages,
    which others may find as their prefix, are fed as soon as they are full.
    """

    def __init__(
        self,
        name: str,
        net: DraftNet,
        cache_specs: list[CacheSpec],
        *,
        shift: int,
        max_depth: int,
        complete: bool = False,
    ) -> None:
        self.name, self.max_depth, self.cache_specs = name, max_depth, cache_specs
        self._net, self._shift, self._complete = net, shift, complete
        self._num_unasked = 0  # steps

    def num_own_pages(self, room: Room) -> int:
        """Pages that `caches` must have behind those that the scheduler knows."""
        return DraftPages.count(room.max_num_seqs, room.page_size, self.max_depth)

    def attach(
        self, caches: Caches, room: Room, first_own_page: int, recorder: Recorder | None = None
    ) -> None:
        """`caches`: a tuple of tensors for each of `cache_specs`, finite from the beginning.

        `recorder` captures short batches, on a CPU of one rank.
        """
        net, self._room = self._net, room
        self._pages = DraftPages(first_own_page, room.page_size, self.max_depth)
        self._later: deque[PassedStep | NDArray[np.int32]] = deque()  # slots: they begin anew
        self._num_later = 0  # tokens in them
        self._backlog = Backlog(room.max_num_seqs, BACKLOG, net.width, net.dtype, net.device)
        self._feeder = Feeder(
            net,
            caches,
            max_num_seqs=room.max_num_seqs,
            page_size=room.page_size,
            recorder=recorder,
        )

    @property
    def num_slow(self) -> int:
        return self._feeder.num_slow

    def bind(self, slots: NDArray[np.int32]) -> None:
        """These slots begin anew."""
        self._backlog.forget(slots)
        if self._later:
            self._put_off(slots.copy())

    def skips(self, *, asked: bool) -> bool:
        self._num_unasked = 0 if asked else self._num_unasked + 1
        if self._complete or self._num_unasked <= SLEEPS_AFTER:
            return False
        self._later.clear()
        self._num_later = 0
        return True

    def draft(self, work: DraftWork) -> Tensor:
        """int64 [R, max num_propose]: proposed ids, -1 where none."""
        deepest = int(work.num_propose.max(initial=0))
        shape, device = (len(work.accepted), deepest), work.ids.device
        if not deepest and not self._complete and len(work.ids) == len(work.batch.places):
            self._put_off(PassedStep.of(work, self._net.beside(work)))
            return work.ids.new_empty(shape)
        while self._later:
            self._take_in()
        found = torch.full(shape, -1, dtype=torch.int64, device=device)
        rows = DraftRows.of(work, self.max_depth, self._room.max_model_len)
        tokens = work.batch.forward.token_ids
        step = Places(_ids_to_feed(work, rows) if self._shift else tokens, self._net.beside(work))
        held = self._held(rows, tokens)
        now = rows.prefills | (rows.wanted > 0)
        if self._complete:
            size, firsts = self._room.page_size, rows.starts - held
            now |= (rows.ends // size > firsts // size) | (rows.ends - firsts > BACKLOG)
        left = self._feed(work, rows, held, now, step)
        self._keep(rows, held, now, step)
        if rows.wanted.any():
            self._chain(work, rows.some(rows.wanted > 0), left, found)
        return found

    def _put_off(self, item: PassedStep | NDArray[np.int32]) -> None:
        """It is taken in when somebody asks, or when there are too many."""
        self._later.append(item)
        if isinstance(item, PassedStep):
            self._num_later += len(item.ids)
        most = max(BACKLOG * self._room.max_num_seqs, LEAST_LATER)
        while len(self._later) > BACKLOG or self._num_later > most:
            self._take_in()

    def _take_in(self) -> None:
        """The oldest of what was put off: a step's places are kept, or slots begin anew."""
        step = self._later.popleft()
        if not isinstance(step, PassedStep):
            self._backlog.forget(step)
            return
        self._num_later -= len(step.ids)
        rows = step.rows()
        ids = step.ids if self._shift else step.token_ids
        held = self._held(rows, step.token_ids)
        self._keep(rows, held, np.zeros(len(held), np.bool_), Places(ids, step.beside))

    def _held(self, rows: DraftRows, tokens: Tensor) -> Ints:
        """[R] places that wait right before each row, whose first token the last one waits for."""
        held = self._backlog.counts(rows.slots, rows.starts)
        if self._shift and held.any():
            holds = held > 0
            first = torch.from_numpy(rows.tokens[holds]).to(tokens.device)
            self._backlog.tell(rows.slots[holds], rows.starts[holds], tokens[first])
        return held

    def _feed(
        self, work: DraftWork, rows: DraftRows, held: Ints, now: NDArray[np.bool_], step: Places
    ) -> Tensor:
        """Feeds what these rows settled behind what they held; [n, W] where drafts are wanted."""
        own = rows.ends - rows.starts - np.where(rows.samples, 0, self._shift)
        chosen = now & (held + own > 0)
        if not chosen.any():
            return step.beside[:0]
        rows, held, own = rows.some(chosen), held[chosen], own[chosen]
        fed = Fed(rows.slots, rows.starts - held, held + own)
        places = step.take(ragged(rows.tokens, own))
        if held.any():
            places = self._joined(fed, held, own, places)
        left = self._feeder.feed(places.ids, places.beside, fed, work.batch.forward.page_table)
        last = (np.cumsum(fed.counts) - 1)[rows.wanted > 0]
        return left if len(last) == len(left) else left[torch.from_numpy(last).to(left.device)]

    def _joined(self, fed: Fed, held: Ints, own: Ints, places: Places) -> Places:
        """What slots held and what came, row by row."""
        begins = np.cumsum(fed.counts) - fed.counts
        of = np.repeat(fed.slots, held)
        kept = Places(*self._backlog.read(of, ragged(fed.starts, held)))
        at = np.concatenate([ragged(begins, held), ragged(begins + held, own)])
        order = np.empty_like(at)
        order[at] = np.arange(len(at))
        both = Places(torch.cat([kept.ids, places.ids]), torch.cat([kept.beside, places.beside]))
        return both.take(order)

    def _keep(self, rows: DraftRows, held: Ints, now: NDArray[np.bool_], step: Places) -> None:
        """Places that are not fed now, and those whose next token is not known."""
        settled = rows.ends - rows.starts
        waits = np.where(rows.samples, 0, self._shift)
        count = np.where(now, waits, np.minimum(settled, BACKLOG))
        starts = np.where(now, rows.ends - count, rows.starts - held)
        self._backlog.keep(rows.slots, starts, rows.ends)
        if count.any():
            of, positions = np.repeat(rows.slots, count), ragged(rows.ends - count, count)
            new = step.take(ragged(rows.tokens + settled - count, count))
            self._backlog.write(of, positions, new.ids, new.beside)

    def _chain(self, work: DraftWork, rows: DraftRows, left: Tensor, found: Tensor) -> None:
        """Drafts into `found`, for rows that all want some; `left` [n, W] is theirs."""
        device, table = found.device, work.batch.forward.page_table
        if len(rows.rows) > 1 and (rows.wanted != rows.wanted[0]).any():
            order = np.argsort(-rows.wanted, kind="stable")  # who is done first is the last
            rows, left = rows.some(order), left[torch.from_numpy(order).to(device)]
        at, ids = torch.from_numpy(rows.rows).to(device), work.ids[:0]
        if not self._shift:
            last = torch.from_numpy(rows.tokens + rows.ends - rows.starts - 1).to(device)
            ids = work.ids[last]
        slots, ones = rows.slots.astype(np.int32), np.ones_like(rows.slots)
        ends = rows.ends + rows.wanted - self._shift
        with self._pages.lent(table, rows.slots, rows.limits, ends):
            for index in range(int(rows.wanted[0])):
                count = int((rows.wanted > index).sum())
                if index >= self._shift:
                    starts = rows.ends[:count] + (index - self._shift)
                    fed = Fed(rows.slots[:count], starts, ones[:count])
                    beside = left[:count, : self._net.width]
                    left = self._feeder.feed(ids[:count], beside, fed, table)
                places = torch.from_numpy(rows.ends[:count] + index + 1).to(device)
                ids = work.sample(self._net.logits(left[:count]), slots[:count], places)
                found[at[:count], index] = ids


def _ids_to_feed(work: DraftWork, rows: DraftRows) -> Tensor:
    """[T] the token behind each that is settled, as far as it is known."""
    if not rows.prefills.any():
        return work.ids
    ids = work.batch.forward.token_ids.roll(-1)
    last = torch.from_numpy((rows.tokens + rows.ends - rows.starts - 1)[rows.samples])
    last = last.to(ids.device)
    ids[last] = work.ids[last]
    return ids
