# SPDX-License-Identifier: MIT
"""`Engine`: plan -> launch -> commit, and what each request gets back. Knows ids, no text.

Nothing that a request contains raises out of `step`: what cannot be served is refused by
`add_request` with a `RequestError`, what fails on the way ends that request with "error".
"""

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from tokenspeed._scheduler import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    MISS_DISABLED,
    MISS_DIVERGED,
    MISS_EVICTED,
    MISS_NEVER_CACHED,
    MISS_NONE,
    Updates,
)
from tokenspeed.engine.admission import Limits, check, known_ids
from tokenspeed.engine.messages import (
    CacheReceipt,
    EngineStats,
    GenerateRequest,
    PrefixOrder,
    Ready,
    RetainPrefix,
    TokenOutput,
    gateway_of,
)
from tokenspeed.engine.pacing import Pacing, check_terms
from tokenspeed.engine.schedulers import Schedulers, user_key
from tokenspeed.engine.speculator import Speculator
from tokenspeed.engine.step_counts import StepCounts
from tokenspeed.engine.step_times import StepTimes
from tokenspeed.errors import RankDiedError, RequestError
from tokenspeed.execution.expert_balancer import BalanceStats
from tokenspeed.execution.grammars import VOCABULARY, News
from tokenspeed.execution.plan_view import Plans
from tokenspeed.execution.runner import InFlight
from tokenspeed.execution.sampler import Sequence
from tokenspeed.execution.step import PromptLogprobs, StepOutput

REASONS = {FINISH_NONE: None, FINISH_STOP: "stop", FINISH_LENGTH: "length", FINISH_ERROR: "error"}
MISSES = {
    MISS_NONE: "",
    MISS_DIVERGED: "diverged",
    MISS_EVICTED: "evicted",
    MISS_NEVER_CACHED: "never_cached",
    MISS_DISABLED: "disabled",
}
FAILED = "the model's numbers for this request are not finite, or no token was allowed"


class Runner(Protocol):
    """What the engine asks of execution (see `execution/runner.py`)."""

    def add(self, request_id: int, sequence: Sequence) -> None: ...
    def remove(self, request_id: int) -> None: ...
    def tell_grammars(self, news: News) -> None: ...
    def launch(self, plans: Plans) -> InFlight: ...
    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Live:
    """A request between `add_request` and its last output."""

    sequence: Sequence
    first_token_s: float | None = None
    prompt_logprobs: PromptLogprobs = field(default_factory=dict)


def _receipts(updates: Updates) -> dict[int, CacheReceipt]:
    """Of the requests of which this is the first that is heard."""
    if not len(updates.receipt_ids):
        return {}
    columns = (updates.receipt_ids, updates.receipt_miss, updates.receipt_kept_us)
    return {
        request_id: CacheReceipt(0, MISSES[miss], kept_us / 1e6)
        for request_id, miss, kept_us in zip(*(column.tolist() for column in columns), strict=True)
    }


class Engine:
    """One model, many requests. Single-threaded; only `num_steps` and `has_work` may be read
    from another thread."""

    def __init__(
        self,
        schedulers: Schedulers,
        runner: Runner,
        ready: Ready,
        *,
        max_logprobs: int,
        depth: int,
        balance: Callable[[], BalanceStats] | None = None,
        speculator: Speculator | None = None,
        pacing: Pacing | None = None,
        times: StepTimes | None = None,
        seed: int = 0,
    ) -> None:
        self.ready = ready
        self.num_steps = 0
        self._schedulers, self._runner = schedulers, runner
        self._limits = Limits(ready.max_model_len, ready.vocab_size, max_logprobs)
        self._depth = depth  # steps that may be in flight beside the one just launched
        self._balance, self._speculator, self._pacing = balance, speculator, pacing
        drafts_learn = speculator is not None and speculator.is_adaptive
        self._times = times if drafts_learn or pacing is not None else None  # if anybody asks
        if pacing is not None:
            schedulers.pace(pacing.policy)
        self._refused: list[TokenOutput] = []  # answers that the next step brings
        self._may_answer = False  # the call before was only for these
        self._seeds = random.Random(seed)
        self._in_flight: deque[InFlight] = deque()
        self._counts = StepCounts()
        self._live: dict[int, _Live] = {}
        self._grammars: Counter[str] = Counter()  # who has added a key that requests may name
        self._death: RankDiedError | None = None  # of another rank: nothing can run any more

    def add_request(self, request: GenerateRequest) -> None:
        """Queues a request. `RequestError`: it cannot be served as asked; nothing has changed."""
        params = request.params
        prompt = check(request, self._limits)
        check_terms(request, paced=self._pacing is not None)
        # A tokenizer may name an end that this model has no logit for.
        stop_ids = [token for token in request.stop_ids if token < self._limits.vocab_size]
        if params.grammar is not None:
            self._check_grammar(params.grammar.key)
            stop_ids = stop_ids or [self._limits.vocab_size - 1]  # the end must have a name
        if self._pacing is not None:
            self._schedulers.advance(time.monotonic())  # its wait begins now
        try:
            self._schedulers.submit(
                request.request_id,
                prompt,
                request.salt,
                max_tokens=params.max_tokens or self._limits.max_model_len - len(prompt),
                # What has a grammar may have to end early; the sampler sees to the rest.
                min_tokens=0 if params.grammar else params.min_tokens,
                stop_ids=np.array(stop_ids, np.int32),
                prompt_logprobs=params.prompt_logprobs is not None,
                user=user_key(request.user),
                retention_s=request.retention.seconds,
                pinned=request.retention.pinned,
                tps_floor=request.tps_floor,
                priority=request.priority,
                max_wait_s=request.max_wait_s,
            )
        except ValueError as error:
            raise RequestError(str(error)) from None
        if self._pacing is not None and (refusal := self._pacing.refusal(request.request_id)):
            self._schedulers.abort(request.request_id)
            self._refused.append(refusal)
            return
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        sequence = Sequence(prompt, params, stop_ids, seed)
        self._live[request.request_id] = _Live(sequence)
        self._runner.add(request.request_id, sequence)
        if self._speculator is not None:
            self._speculator.add(request.request_id, prompt, request.salt)

    def add_grammar(self, key: str, data: bytes) -> None:
        """Requests may name this grammar until it is dropped. What is wrong with it shows there."""
        self._grammars[key] += 1
        if self._grammars[key] == 1:
            self._runner.tell_grammars((key, data))

    def drop_grammar(self, key: str) -> None:
        """Once for each time it was added: then no later request names it; those that run have
        theirs."""
        if key not in self._grammars:
            return
        self._grammars[key] -= 1
        if not self._grammars[key]:
            del self._grammars[key]
            self._runner.tell_grammars((key, None))

    def _check_grammar(self, key: str) -> None:
        if key == VOCABULARY or key not in self._grammars:
            raise RequestError(
                "grammar: the engine was not given this grammar",
                field="grammar",
                code="unknown_grammar",
            )

    def abort(self, request_id: int) -> None:
        """Ends a request in any state; no output follows. Unknown ids are ignored."""
        self._refused = [late for late in self._refused if late.request_id != request_id]
        if self._live.pop(request_id, None) is not None:
            self._schedulers.abort(request_id)
            self._forget(request_id)

    def abort_of(self, gateway: int) -> int:
        """Ends all requests of a gateway that is gone; returns how many."""
        own = [request_id for request_id in self._live if gateway_of(request_id) == gateway]
        for request_id in own:
            self.abort(request_id)
        return len(own)

    def step(self) -> list[TokenOutput]:
        """Plans and launches a step if there is one, then commits what is due.

        `RankDiedError`: another rank ended. Then every later step says the same.
        """
        if self._death is not None:
            raise RankDiedError(str(self._death))
        try:
            return self._step()
        except RankDiedError as error:
            self._death = error
            raise

    def _step(self) -> list[TokenOutput]:
        began_s = time.monotonic()
        self._schedulers.advance(began_s)
        self._may_answer = bool(self._refused) and not self._may_answer
        if self._may_answer:  # who is refused waits for no step, and keeps nobody from one
            return self._take_refused()
        speculator = self._speculator
        if speculator is not None:
            speculator.prepare(self._schedulers)
        plans = self._schedulers.next_plans()
        dozes = False
        if plans is not None:
            dozes = speculator is not None and speculator.dozes(plans, self._counts.busy_s)
            if speculator is not None and not dozes:
                speculator.launched(plans)
            if self._times is not None and not dozes:
                self._times.launched(plans, began_s)
            self._counts.planned(plans)
            self._in_flight.append(self._runner.launch(plans))
        outputs = [] if self._pacing is None else self._refusals(self._pacing)
        while len(self._in_flight) > (self._depth if plans is not None else 0):
            self.num_steps += 1
            is_typical = True
            steps = self._in_flight.popleft().result()
            if self._pacing is not None:
                self._schedulers.advance(time.monotonic())  # tokens come now
            for index, step in enumerate(steps):
                if step is not None:
                    outputs += self._commit(index, step)
                    is_typical = is_typical and step.is_typical
            now_s = time.monotonic()
            if self._times is not None and not dozes:
                self._times.committed(now_s, is_typical=is_typical)
            if speculator is not None and dozes and not is_typical:
                speculator.held_up()
            if speculator is not None and not dozes:
                busy_s = self._counts.busy_s + now_s - began_s
                speculator.committed(busy_s, is_typical=is_typical)
            if self._pacing is not None:
                self._pacing.committed()
            if plans is None:
                break  # pages came back: there may be a plan now
        self._counts.busy_s += time.monotonic() - began_s
        return outputs

    def _refusals(self, pacing: Pacing) -> list[TokenOutput]:
        late = pacing.overdue()
        for answer in late:
            self.abort(answer.request_id)
        return self._take_refused() + late

    def _take_refused(self) -> list[TokenOutput]:
        refused, self._refused = self._refused, []
        return refused

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._live or self._in_flight or self._refused)

    def stats(self) -> EngineStats:
        """The scheduler's counts, as the gateway's metrics show them."""
        drafts = None if self._speculator is None else self._speculator.stats()
        made = self._schedulers.stats() | asdict(self._counts)
        pacing = None if self._pacing is None else self._pacing.stats()
        times = None if self._times is None else self._times.stats()
        stats = EngineStats(**made, speculation=drafts, pacing=pacing, step_times=times)
        if self._balance is None:
            return stats
        balance = self._balance()
        return replace(
            stats,
            expert_load_mean=balance.mean,
            expert_load_worst=balance.worst,
            expert_load_rebalances=balance.num_rebalances,
            expert_load_slots_moved=balance.num_moved,
        )

    def flush_cache(self) -> int:
        """Forgets every cached page that no request uses, and returns how many; and the texts of
        requests that ended, from which drafters copy."""
        if self._speculator is not None:
            self._speculator.forget_ended()
        return self._schedulers.flush_cache()

    def order_prefix(self, order: PrefixOrder) -> int:
        """Retains or drops the cached pages of a prefix; returns on how many pages it acted.

        Ids that the model does not know have no pages, and a time below 0 is none.
        """
        tokens = known_ids(order.token_ids, self._limits)
        if not isinstance(order, RetainPrefix):
            return self._schedulers.release(tokens, order.salt)
        self._schedulers.advance(time.monotonic())
        retention = order.retention
        seconds = retention.seconds if retention.seconds > 0 else 0.0  # no NaN either
        return self._schedulers.retain(
            tokens, order.salt, retention_s=seconds, pinned=retention.pinned
        )

    def close(self) -> None:
        """Waits for the steps in flight. The engine is of no use afterwards."""
        self._runner.close()

    def _commit(self, index: int, step: StepOutput) -> list[TokenOutput]:
        updates = self._schedulers.commit(index, step.words)
        for request_id, entries in step.prompt_logprobs.items():
            if request_id in self._live:
                self._live[request_id].prompt_logprobs.update(entries)
        return self._outputs(updates, step)

    def _outputs(self, updates: Updates, step: StepOutput) -> list[TokenOutput]:
        outputs = []
        request_ids, num_ids = updates.request_ids.tolist(), updates.num_ids.tolist()
        all_ids, at = updates.ids.tolist(), 0
        receipts = _receipts(updates)
        if self._speculator is not None:
            self._speculator.extend((request_ids, num_ids, all_ids), step.drafts)
        for request_id, finish, count, num_cached in zip(
            request_ids, updates.finish.tolist(), num_ids, updates.num_cached.tolist(), strict=True
        ):
            ids, at = all_ids[at : at + count], at + count
            live = self._live[request_id]
            logprobs = step.logprobs.get(request_id) if ids else None
            outputs.append(
                TokenOutput(
                    request_id,
                    ids,
                    finish_reason=REASONS[finish],
                    stop_token_id=ids[-1] if finish == FINISH_STOP else None,
                    num_cached_tokens=num_cached,
                    receipt=receipts.get(request_id),
                    logprobs=None if logprobs is None else logprobs[: len(ids)],
                    error=FAILED if finish == FINISH_ERROR else None,
                    **self._advance(live, request_id, ids, over=finish != FINISH_NONE),
                )
            )
        return outputs

    def _advance(
        self, live: _Live, request_id: int, ids: list[int], *, over: bool
    ) -> dict[str, Any]:
        """Moves the request on; what only its first and its last output carry."""
        sequence = live.sequence
        extra: dict[str, Any] = {}
        if ids and live.first_token_s is None:
            live.first_token_s = time.monotonic()
            self._schedulers.started(request_id)
            if sequence.params.prompt_logprobs is not None:
                extra["prompt_logprobs"] = [
                    live.prompt_logprobs.get(i) for i in range(sequence.prompt_len)
                ]
        sequence.output_ids += ids
        if over:
            del self._live[request_id]
            self._schedulers.forget(request_id)
            if self._speculator is not None:
                drafted = self._speculator.drafted(request_id)
                extra["num_draft_tokens"], extra["num_accepted_tokens"] = drafted
            self._forget(request_id)
            started = sequence.started_s or sequence.arrived_s
            extra["queue_s"] = started - sequence.arrived_s
            extra["prefill_s"] = (live.first_token_s or started) - started
        return extra

    def _forget(self, request_id: int) -> None:
        """Of a request that the scheduler does not know any more."""
        self._runner.remove(request_id)
        if self._speculator is not None:
            self._speculator.remove(request_id)
