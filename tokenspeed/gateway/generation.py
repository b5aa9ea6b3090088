# SPDX-License-Identifier: MIT
"""`Generation`: the choices of one HTTP request, from ids to text. Knows no dialect.

A prompt with `n` answers is n requests to the engine; all their outputs come to one mailbox. A
stream is one write for each wake-up, whatever arrived in between; it begins with the first token
(or the first sign of life), so that an error before it is still an HTTP status.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from tokenspeed.engine.messages import TokenOutput
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs
from tokenspeed.gateway.api_error import ApiError, of_exception
from tokenspeed.gateway.app import Call
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.mailbox import Mailbox
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.tokenizer import Tokenizer

MAX_CHOICES = 256
DONE = b"data: [DONE]\n\n"
_STREAM = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Choice:
    """One answer. `text`, `token_ids` and `logprobs` are what came since the last `clear`."""

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.params = params
        self.request_id = -1
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.num_tokens = 0
        self.num_cached = 0
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
            )

    def clear(self) -> None:
        self.text, self.token_ids, self.logprobs = "", [], []

    def feed(self, output: TokenOutput) -> bool:
        """Takes new tokens; whether they were the last.

        Raises `ApiError` if the engine could not go on with this request.
        """
        if output.finish_reason == "error":
            raise ApiError(500, output.error or "the request failed", code="generation_failed")
        if self.num_tokens == 0:
            self.num_cached = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        ids = output.token_ids
        if self._detokenizer is not None:
            ids = self._detokenize(self._detokenizer, output)
        if output.logprobs is not None:
            self.logprobs += output.logprobs[: len(ids)]
        self.num_tokens += len(ids)
        self.token_ids += ids
        if self.finish_reason is None and output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            if output.stop_token_id in (self.params.stop_token_ids or ()):
                self.stop_reason = output.stop_token_id
        return self.finish_reason is not None

    def _detokenize(self, detokenizer: Detokenizer, output: TokenOutput) -> list[int]:
        """Appends text; returns the ids that count, which end where a stop string is complete."""
        before = detokenizer.num_tokens
        ids = output.token_ids
        self.text += detokenizer.push(ids, ended_by_token=output.stop_token_id is not None)
        if output.finish_reason is not None:
            self.text += detokenizer.finish()
        if detokenizer.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", detokenizer.stopped
        return ids[: detokenizer.num_tokens - before]


class Dialect(Protocol):
    """What the events of one endpoint look like."""

    def chunk(self, choice: Choice) -> bytes:
        """The events for what `choice` has gained; it is cleared afterwards."""
        ...

    def closing(self) -> bytes:
        """The events after the last chunk, before `[DONE]`."""
        ...


class Generation(AbstractContextManager["Generation"]):
    """All choices of a request: `n` for each prompt, prompt by prompt. Aborts on leaving."""

    def __init__(
        self,
        pool: EnginePool,
        tokenizer: Tokenizer | None,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        salt: bytes,
    ) -> None:
        if len(prompts) * params.n > MAX_CHOICES:
            raise RequestError(
                f"n: at most {MAX_CHOICES} answers to all prompts of a request", field="n"
            )
        self.choices = [
            Choice(i * params.n + j, prompt, one, tokenizer)
            for i, prompt in enumerate(prompts)
            for j, one in enumerate(params.choices())
        ]
        self.num_running = len(self.choices)
        self.params = params
        self._pool, self._salt = pool, salt
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
                    self.mailbox, same[0].prompt_ids, wanted, stop_ids, self._salt
                )
                for choice, request_id in zip(same, ids, strict=True):
                    choice.request_id = request_id
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not thrown into the context: leaving is the same for every reason.
        self._box_context.__exit__(None, None, None)

    async def next(self) -> list[Choice]:
        """The choices that changed; none when a sign of life is due.

        Raises `RequestError`, `ApiError` or `EngineDeadError` if the request cannot go on.
        """
        changed: list[Choice] = []
        for index, output in await self.mailbox.take():
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue
            finished = choice.feed(output)
            if choice not in changed:
                changed.append(choice)
            if finished:
                self.num_running -= 1
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
                changed = await self.next()
                parts = [dialect.chunk(choice) for choice in changed]
                for choice in changed:
                    choice.clear()
                if not self.num_running:
                    parts += (dialect.closing(), DONE)
                await self._write(call, b"".join(parts) if changed else b": keep-alive\n\n")
        except Exception as error:
            if not call.started:
                raise
            await self._write(call, b"data: " + of_exception(error).body() + b"\n\n" + DONE)
        await call.send({"type": "http.response.body", "body": b""})

    async def _write(self, call: Call, data: bytes) -> None:
        if not data:
            return  # all of it is held back, for instance as the possible start of a stop string
        self.mailbox.sending += 1
        if not call.started:
            await call.start(200, "text/event-stream; charset=utf-8", _STREAM)
        await call.send({"type": "http.response.body", "body": data, "more_body": True})
        self.mailbox.sending += 1

    def usage(self) -> dict[str, object]:
        """Tokens so far, in OpenAI's shape. A prompt counts once, whatever `n` is."""
        firsts = self.choices[:: self.params.n]
        prompt = sum(len(choice.prompt_ids) for choice in firsts)
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.num_cached for c in firsts)},
        }


def room_left(
    max_tokens: int | None, prompts: Sequence[list[int]], max_model_len: int, field: str
) -> int:
    """`max_tokens`, but no more than the longest prompt leaves room for.

    Raises `context_length_exceeded` for a prompt that leaves room for no token.
    """
    longest = max(map(len, prompts))
    if longest >= max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt"
            f" has {longest} tokens. Please reduce the length of the prompt.",
            field=field,
            code="context_length_exceeded",
        )
    room = max_model_len - longest
    return room if max_tokens is None else min(max_tokens, room)
