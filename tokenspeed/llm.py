# SPDX-License-Identifier: MIT
"""`LLM`: prompts in, texts out, the engine in this very process. Knows no HTTP and no sockets.

What comes back is shaped like vLLM's `RequestOutput`.
"""

import contextlib
import itertools
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from tokenspeed.config import EngineConfig
from tokenspeed.engine.build import build_engine, resolve_folders
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import AddGrammar, DropGrammar, GenerateRequest, TokenOutput
from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs
from tokenspeed.execution.speculation.options import speculation_of
from tokenspeed.models.hf_config import eos_token_ids
from tokenspeed.text.chat_template import ChatTemplate
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.grammar import GrammarCompiler, GrammarMirror, GrammarSpec
from tokenspeed.text.output_format import content_tag, structured_outputs
from tokenspeed.text.tokenizer import Tokenizer

Prompt = str | list[int] | dict[str, Any]  # a dict has one key: prompt or prompt_token_ids
Tokenized = tuple[str | None, list[int]]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability at one position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None


Position = dict[int, Logprob]  # by token id, the chosen token first


@dataclass
class CompletionOutput:
    """One answer. It grows while the engine runs and is complete once `finish_reason` is set."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Position] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "error"
    stop_reason: int | str | None = None  # the stop token id or string; None for end of sequence


@dataclass
class RequestOutput:
    """One prompt and its `n` answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Position | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass
class _Choice:
    """One engine request: where its tokens go and what turns them into text."""

    request: RequestOutput
    output: CompletionOutput
    params: SamplingParams
    detokenizer: Detokenizer | None


class LLM:
    """A model ready to generate. `LLM(model=..., **options)` takes every option of `EngineConfig`.

    Raises `ModelLoadError` or `ValueError` if it cannot be built, `RankDiedError` if another of its
    processes ends. `close` it, or use it in a `with` block, to end those. Not thread-safe.
    """

    def __init__(
        self, model: str | None = None, *, config: EngineConfig | None = None, **options: Any
    ) -> None:
        if config is None:
            config = EngineConfig.of(**options, **({} if model is None else {"model": model}))
        elif options or model is not None:
            raise ValueError("give either config or options, not both")
        self.config = config
        if (count := config.parallel.data_parallel_size) != 1:
            raise ValueError(
                f"data_parallel_size is {count}, and an LLM is one engine: leave it at 1, or make"
                " several, or serve with `tokenspeed serve --data-parallel-size`"
            )
        speculation_of(config)
        folder, tokenizer_folder = resolve_folders(config)
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        if not config.model.skip_tokenizer_init:
            self._tokenizer = Tokenizer.from_folder(tokenizer_folder)
            self._template = ChatTemplate.from_folder(
                tokenizer_folder, self._tokenizer.special_tokens, config.model.chat_template
            )
        self._eos_ids = self._tokenizer.eos_ids if self._tokenizer else eos_token_ids(folder)
        self._engine = build_engine(config, folder=folder)
        # Other ranks end with this object, or with the interpreter.
        self._end = weakref.finalize(self, self._engine.close)
        self._ids = itertools.count()
        self._grammars: GrammarCompiler | None = None
        # Holds the engine and not this object, which would else end at some later time.
        self._mirror = GrammarMirror(partial(_tell_grammar, self._engine))
        self._unread: dict[int, list[TokenOutput]] = {}  # of requests that another call drives

    def close(self) -> None:
        """Ends the other processes. May be called again; nothing else may."""
        self._end()
        if self._grammars is not None:
            self._grammars.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. `ValueError` if the LLM was built with `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer: skip_tokenizer_init is set")
        return self._tokenizer

    def generate(
        self,
        prompts: str | dict[str, Any] | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; results come in the prompts' order.

        `sampling_params` is one for all or one each. `RequestError` if any prompt cannot be
        served; then none is.
        """
        listed: list[Prompt] = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        tokenized = [self._tokenize(prompt) for prompt in listed]
        return self._complete(tokenized, _one_each(sampling_params, len(listed)), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several, by the model's chat template."""
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if single else list(messages)
        extra = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        tokenized = [
            self._render(conversation, **extra, **(chat_template_kwargs or {}))
            for conversation in conversations
        ]
        return self._complete(tokenized, _one_each(sampling_params, len(tokenized)), use_tqdm)

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece. Stops the engine's work when closed."""
        params = (sampling_params or SamplingParams()).replace(n=1)
        text, ids = self._render(messages)
        _, choices = self._submit([(text, ids)], [params])
        for _, piece in self._drive(choices):
            if piece:
                yield piece

    def _render(self, messages: Messages, **options: Any) -> Tokenized:
        tokenizer = self.get_tokenizer()
        if self._template is None:
            raise ValueError("there is no chat template: skip_tokenizer_init is set")
        text = self._template.render(messages, **options)
        return text, tokenizer.encode(text, add_special_tokens=False)

    def _tokenize(self, prompt: Prompt) -> Tokenized:
        if isinstance(prompt, dict):
            if prompt.keys() == {"prompt_token_ids"}:
                return None, list(prompt["prompt_token_ids"])
            if prompt.keys() != {"prompt"}:
                raise RequestError(
                    f"prompt: a dict has either prompt or prompt_token_ids, got {sorted(prompt)}",
                    field="prompt",
                )
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt)
        if not isinstance(prompt, list):
            raise RequestError("prompt: must be text, a list of ids or a dict", field="prompt")
        return None, prompt

    def _complete(
        self,
        prompts: list[Tokenized],
        params: list[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests, choices = self._submit(prompts, params)
        with tqdm(total=len(requests), desc="Prompts", disable=not use_tqdm) as bar:
            for choice, _ in self._drive(choices):
                if choice.output.finish_reason is not None and choice.request.finished:
                    bar.update()
        return requests

    def _submit(
        self, prompts: list[Tokenized], params: list[SamplingParams]
    ) -> tuple[list[RequestOutput], dict[int, _Choice]]:
        """Hands every choice of every prompt to the engine, or none of them."""
        if not self._end.alive:
            raise RuntimeError("this LLM is closed")
        requests: list[RequestOutput] = []
        choices: dict[int, _Choice] = {}
        try:
            for (text, ids), asked in zip(prompts, params, strict=True):
                request = RequestOutput(str(len(requests)), text, ids, [])
                requests.append(request)
                asked = self._with_grammar(asked)
                for index, one in enumerate(asked.choices()):
                    output = CompletionOutput(index, logprobs=None if one.logprobs is None else [])
                    request.outputs.append(output)
                    stop_ids = one.all_stop_ids(self._eos_ids)
                    request_id = next(self._ids)
                    choice = _Choice(request, output, one, self._detokenizer(one, ids))
                    with _uninterrupted():
                        self._engine.add_request(GenerateRequest(request_id, ids, one, stop_ids))
                        choices[request_id] = choice
        except BaseException:
            self._abort(choices)
            raise
        return requests, choices

    def _with_grammar(self, params: SamplingParams) -> SamplingParams:
        """With the grammar of its `structured_outputs`, if it has any: of the whole answer."""
        if params.structured_outputs is None:
            return params
        output = structured_outputs(params.structured_outputs)
        if output is None:
            return params.replace(structured_outputs=None)
        if self._grammars is None:
            tokenizer = self.get_tokenizer()
            self._grammars = GrammarCompiler(tokenizer, self._engine.ready.vocab_size)
        added = {text: token for token, text in self.get_tokenizer().added_tokens.items()}
        spec = GrammarSpec(content_tag(output, "structured_outputs", added))
        grammar = self._grammars.compile(spec)
        self._mirror.provide(grammar)
        return params.replace(structured_outputs=None, grammar=grammar)

    def _detokenizer(self, params: SamplingParams, prompt_ids: list[int]) -> Detokenizer | None:
        if self._tokenizer is None:
            if params.stop:
                raise RequestError("stop: needs a tokenizer", field="stop")
            return None
        return Detokenizer(
            self._tokenizer,
            stop=params.stop or (),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            prompt_ids=prompt_ids,
        )

    def _drive(self, choices: dict[int, _Choice]) -> Iterator[tuple[_Choice, str]]:
        """Steps the engine until all choices are over; yields each with the text it gained."""
        try:
            while choices:
                for output in self._outputs(choices):
                    choice = choices.get(output.request_id)
                    if choice is None:
                        continue
                    piece = self._take(choice, output)
                    if choice.output.finish_reason is not None:
                        del choices[output.request_id]
                        self._engine.abort(output.request_id)  # a stop string ended it here only
                    yield choice, piece
        finally:
            self._abort(choices)

    def _outputs(self, choices: dict[int, _Choice]) -> list[TokenOutput]:
        """What another call's steps brought for these choices, or else what the next step brings.

        Several streams may be open at once; every step serves all of them.
        """
        kept = [self._unread.pop(request_id) for request_id in choices & self._unread.keys()]
        if kept:
            return list(itertools.chain.from_iterable(kept))
        with _uninterrupted():
            outputs = self._engine.step()
            for output in outputs:
                if output.request_id not in choices:
                    self._unread.setdefault(output.request_id, []).append(output)
        return outputs

    def _abort(self, choices: dict[int, _Choice]) -> None:
        with _uninterrupted():
            for request_id in choices:
                self._engine.abort(request_id)
                self._unread.pop(request_id, None)

    def _take(self, choice: _Choice, new: TokenOutput) -> str:
        """Adds what the engine says to the choice; returns the text that became certain."""
        output, detokenizer = choice.output, choice.detokenizer
        if choice.output.index == 0:
            choice.request.num_cached_tokens = new.num_cached_tokens
            if new.prompt_logprobs is not None:
                choice.request.prompt_logprobs = [
                    None if at is None else self._position(at) for at in new.prompt_logprobs
                ]
        output.finish_reason = new.finish_reason
        if new.stop_token_id in (choice.params.stop_token_ids or ()):
            output.stop_reason = new.stop_token_id
        kept, piece = len(new.token_ids), ""
        if detokenizer is not None:
            before = detokenizer.num_tokens
            piece = detokenizer.push(new.token_ids, ended_by_token=new.stop_token_id is not None)
            if new.finish_reason is not None:
                piece += detokenizer.finish()
            if detokenizer.stopped is not None:
                output.finish_reason, output.stop_reason = "stop", detokenizer.stopped
                kept = detokenizer.num_tokens - before
        output.token_ids += new.token_ids[:kept]
        output.text += piece
        self._take_logprobs(output, (new.logprobs or [])[:kept])
        return piece

    def _take_logprobs(self, output: CompletionOutput, entries: list[TokenLogprobs]) -> None:
        for entry in entries:
            if output.logprobs is not None:
                output.logprobs.append(self._position(entry))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + entry.logprobs[0]

    def _position(self, entry: TokenLogprobs) -> Position:
        found: Position = {}
        for token_id, logprob, rank in zip(
            entry.token_ids, entry.logprobs, entry.ranks, strict=True
        ):
            text = None if self._tokenizer is None else self._tokenizer.token_text(token_id)
            found.setdefault(token_id, Logprob(logprob, rank, text))
        return found


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is over: half a step would leave the engine of no use."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    listed = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(listed) != count:
        raise ValueError(f"{count} prompts, but {len(listed)} sampling_params")
    return listed


def _tell_grammar(engine: Engine, message: AddGrammar | DropGrammar) -> bool:
    if isinstance(message, AddGrammar):
        engine.add_grammar(message.key, message.data)
    else:
        engine.drop_grammar(message.key)
    return True
