# SPDX-License-Identifier: MIT
"""`Generation`: the choices of one HTTP request, from ids to text. Knows no dialect.

A prompt with `n` answers is n requests to the engine; all their outputs come to one mailbox. A
stream is one write for each wake-up, whatever arrived in between; it begins with the first token
(or the first sign of life), so that an error before it is still an HTTP status.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from tokenspeed.engine.messages import CacheReceipt, TokenOutput
from tokenspeed.errors import ContextLengthError, RequestError
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs
from tokenspeed.gateway.answer import Answer
from tokenspeed.gateway.api_error import ApiError, of_exception, overloaded
from tokenspeed.gateway.app import Call
from tokenspeed.gateway.engine_pool import EnginePool, Sent
from tokenspeed.gateway.mailbox import Mailbox
from tokenspeed.gateway.request_log import RequestRecord
from tokenspeed.text.channels import Piece
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.tokenizer import Tokenizer

MAX_CHOICES = 256
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Choice:
    """One answer. `text`, `token_ids` and `logprobs` are what came since the last `clear`.

    With an `answer` the text goes there, and `text` stays empty.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        answer: Answer | None = None,
        shown: frozenset[str] = frozenset(),
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.params = params
        self.answer = answer
        self.request_id = -1
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.num_tokens = 0
        self.output_ids: list[int] = []  # all of them
        self.stop_token_id: int | None = None  # that ended it, the last of its ids
        self.num_cached = 0
        self.receipt: CacheReceipt | None = None
        self.begun = False  # for a dialect that opens a choice with something of its own
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer,
                stop=params.stop or (),
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                prompt_ids=prompt_ids,
                shown=shown,
            )

    @property
    def num_reasoning(self) -> int:
        return 0 if self.answer is None else self.answer.num_reasoning_tokens

    def clear(self) -> None:
        self.text, self.token_ids, self.logprobs = "", [], []

    def feed(self, output: TokenOutput) -> bool:
        """Takes new tokens; whether they were the last.

        Raises `ApiError` if the engine could not go on with this request.
        """
        if output.finish_reason == "error":
            raise _failure(output, self.params)
        if self.num_tokens == 0:
            self.num_cached = output.num_cached_tokens
            self.receipt = output.receipt
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        ids = output.token_ids
        if self._detokenizer is not None:
            ids = self._detokenize(self._detokenizer, output)
        if output.logprobs is not None:
            self.logprobs += output.logprobs[: len(ids)]
        self.num_tokens += len(ids)
        self.token_ids += ids
        self.output_ids += ids
        if self.finish_reason is None:
            if output.finish_reason is None:
                return False
            self.finish_reason = output.finish_reason
            self.stop_token_id = output.stop_token_id
            if output.stop_token_id in (self.params.stop_token_ids or ()):
                self.stop_reason = output.stop_token_id
        if self.answer is not None and self.finish_reason == "stop" and self.answer.calls:
            self.finish_reason = "tool_calls"
        return True

    def _detokenize(self, detokenizer: Detokenizer, output: TokenOutput) -> list[int]:
        """Appends text; returns the ids that count, which end where a stop string is complete."""
        before = detokenizer.num_tokens
        ids, by_token = output.token_ids, output.stop_token_id is not None
        if self.answer is not None:
            self._parse(self.answer, detokenizer, output)
        else:
            self.text += detokenizer.push(ids, ended_by_token=by_token)
            if output.finish_reason is not None:
                self.text += detokenizer.finish()
        if detokenizer.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped
        return ids[: detokenizer.num_tokens - before]

    def _parse(self, answer: Answer, detokenizer: Detokenizer, output: TokenOutput) -> None:
        """Id by id: how many came at once never shows."""
        last = len(output.token_ids) - 1 if output.stop_token_id is not None else -1
        for i, token in enumerate(output.token_ids):
            answer.push(detokenizer.pieces(token, ended_by_token=i == last))
            if detokenizer.stopped is not None or answer.full:
                break
        if answer.full:
            self.finish_reason = "stop"
        if output.finish_reason or detokenizer.stopped is not None or answer.full:
            answer.finish([Piece(detokenizer.finish())])


def _failure(output: TokenOutput, params: SamplingParams) -> ApiError:
    """A request that leaves the model no token is its own mistake; one without room comes back."""
    if output.code is not None:
        why, wait_s = output.error or "there is no room", output.retry_after_s or 0.0
        return overloaded(why, output.code, max(1, math.ceil(wait_s)))
    if params.grammar or params.allowed_token_ids or params.bad_words_token_ids:
        why = "what the request allows left no token to go on with, or takes too long to follow"
        return ApiError(400, why, code="no_token_left")
    return ApiError(500, output.error or "the request failed", code="generation_failed")


class Dialect(Protocol):
    """What the events of one endpoint look like."""

    def chunk(self, choice: Choice) -> bytes:
        """The events for what `choice` has gained; it is cleared afterwards."""
        ...

    def closing(self) -> bytes:
        """The events after the last chunk."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The event that says that the stream ends here."""
        ...

    def keep_alive(self) -> bytes:
        """A sign of life."""
        ...


class Generation(AbstractContextManager["Generation"]):
    """All choices of a request: `n` for each prompt, prompt by prompt. Aborts on leaving."""

    def __init__(
        self,
        pool: EnginePool,
        tokenizer: Tokenizer | None,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        sent: Sent,
        *,
        answer: Callable[[], Answer] | None = None,
        shown: frozenset[str] = frozenset(),
        record: RequestRecord | None = None,
        finished: Callable[[Choice], None] | None = None,
    ) -> None:
        if len(prompts) * params.n > MAX_CHOICES:
            raise RequestError(
                f"n: at most {MAX_CHOICES} answers to all prompts of a request", field="n"
            )
        self.choices = [
            Choice(i * params.n + j, prompt, one, tokenizer, answer and answer(), shown)
            for i, prompt in enumerate(prompts)
            for j, one in enumerate(params.choices())
        ]
        self.num_running = len(self.choices)
        self.params = params
        self._record = record or RequestRecord()
        self._finished = finished  # told of a choice before its client sees its end
        self._pool, self._sent = pool, sent
        self._eos = tokenizer.eos_ids if tokenizer is not None else ()

    def __enter__(self) -> "Generation":
        """Submits everything. Raises 503 if there is no room; then nothing has been submitted."""
        vocab_size = self._pool.check_room(len(self.choices)).vocab_size
        stop_ids = self.params.all_stop_ids([i for i in self._eos if i < vocab_size])
        self._box_context = self._pool.mailbox()
        self.mailbox: Mailbox = self._box_context.__enter__()
        try:
            for at in range(0, len(self.choices), self.params.n):
                same = self.choices[at : at + self.params.n]
                wanted = [(choice.index, choice.params) for choice in same]
                ids = self._pool.submit(
                    self.mailbox, same[0].prompt_ids, wanted, stop_ids, self._sent
                )
                for choice, request_id in zip(same, ids, strict=True):
                    choice.request_id = request_id
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        self._record.num_choices = len(self.choices)
        self._record.tps_floor = self._sent.urgency.tps_floor
        self._record.submit([choice.prompt_ids for choice in self.firsts], self._sent.salt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._report()
        # Not thrown into the context: leaving is the same for every reason.
        self._box_context.__exit__(None, None, None)

    async def next(self) -> list[Choice]:
        """The choices that changed; none when a sign of life is due.

        Raises `RequestError`, `ApiError` or `EngineDeadError` if the request cannot go on.
        """
        return self._feed(await self.mailbox.take())

    def _feed(self, items: list[tuple[int, TokenOutput]]) -> list[Choice]:
        """Gives outputs to their choices; returns those that changed."""
        changed: list[Choice] = []
        record = self._record
        for index, output in items:
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue
            record.feed(index, output)
            if output.code is not None:
                self._pool.metrics.rejections[output.code] += 1
            finished = choice.feed(output)
            if not record.first_call and choice.answer is not None and choice.answer.has_calls:
                record.call_seen()
            if choice not in changed:
                changed.append(choice)
            if finished:
                self.num_running -= 1
                if self._finished is not None:
                    self._finished(choice)
                if output.finish_reason is None:
                    self.mailbox.stop_early(choice.request_id)
        return changed

    async def finish(self) -> list[Choice]:
        """All choices, whole."""
        while self.num_running:
            await self.next()
        return self.choices

    async def stream(self, call: Call, dialect: Dialect) -> None:
        """Server-sent events until every choice is finished. A late error is an event, too."""
        try:
            while self.num_running:
                changed = self._feed(await self.mailbox.take())
                parts = [] if changed else [dialect.keep_alive()]
                for choice in changed:
                    parts.append(dialect.chunk(choice))
                    choice.clear()
                if not self.num_running:
                    parts.append(dialect.closing())
                await self._write(call, b"".join(parts))
        except Exception as error:
            if not call.started:
                raise
            answer = of_exception(error)
            self._record.error = answer.code
            await self._write(call, dialect.failure(answer))
        await call.send({"type": "http.response.body", "body": b""})

    async def _write(self, call: Call, data: bytes) -> None:
        if not data:
            return  # all of it is held back, for instance as the possible start of a stop string
        self.mailbox.sending += 1
        if not call.started:
            await call.start(200, "text/event-stream; charset=utf-8", SSE_HEADERS)
        await call.send({"type": "http.response.body", "body": data, "more_body": True})
        self.mailbox.sending += 1

    @property
    def firsts(self) -> list[Choice]:
        """One choice for each prompt."""
        return self.choices[:: self.params.n]

    def _report(self) -> None:
        """What has come of the request, for those who keep books."""
        record, firsts, choices = self._record, self.firsts, self.choices
        record.num_cached = sum(choice.num_cached for choice in firsts)
        record.num_output = sum(choice.num_tokens for choice in choices)
        record.num_calls = sum(len(choice.answer.calls) for choice in choices if choice.answer)
        record.finish = ",".join(sorted({choice.finish_reason or "abort" for choice in choices}))
        if (receipt := firsts[0].receipt) is not None:
            record.num_host, record.reason = receipt.num_host, receipt.reason


def room_left(
    max_tokens: int | None, prompts: Sequence[list[int]], max_model_len: int, field: str
) -> int:
    """`max_tokens`, but no more than the longest prompt leaves room for.

    Raises `ContextLengthError` for a prompt that leaves room for no token.
    """
    longest = max(map(len, prompts))
    if longest >= max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt"
            f" has {longest} tokens. Please reduce the length of the prompt.",
            longest,
            max_model_len,
            field=field,
        )
    room = max_model_len - longest
    return room if max_tokens is None else min(max_tokens, room)
