# SPDX-License-Identifier: MIT
"""`Grammars`: the grammar of a turn's answer, made without holding up the event loop.

Knows what a turn asks for and the model's format; no dialect, no engine. Nothing is loaded before
the first request that needs it.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import Grammar
from tokenspeed.text.answer_grammar import AnswerGrammar
from tokenspeed.text.channels import Channel, Format
from tokenspeed.text.conversation import OutputFormat, Tool, ToolChoice
from tokenspeed.text.grammar import CompiledGrammar, GrammarCompiler, GrammarSpec
from tokenspeed.text.tokenizer import Tokenizer


class Grammars:
    """For one model and its tokenizer (None: whatever needs a grammar is refused)."""

    def __init__(self, tokenizer: Tokenizer | None, answers: Format) -> None:
        self._tokenizer = tokenizer
        added = {} if tokenizer is None else tokenizer.added_tokens
        self._answers = AnswerGrammar(answers, {text: token for token, text in added.items()})
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._wanted: Counter[Future[CompiledGrammar]] = Counter()  # by how many turns

    async def of(
        self,
        vocab_size: int,
        *,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        output: OutputFormat | None = None,
        starts_in: Channel | None = None,
        field: str = "response_format",
        owner: str = "",
    ) -> Grammar | None:
        """What the answer must follow, or None.

        `field`: what the dialect calls `output`. `owner`: the user, whose grammars wait behind
        each other and not before those of others.

        `starts_in`: where the answer begins; None: it has no channels.

        `RequestError` for what cannot be enforced, with the codes `invalid_grammar`,
        `grammar_limit` and `unsupported_parameter`.
        """
        choice = choice or ToolChoice()
        if output is None and not _needs_grammar(tools, choice):
            return None

        def make(loose: bool) -> GrammarSpec | None:
            return self._answers.spec(tools, choice, output, starts_in, field=field, loose=loose)

        spec = await asyncio.to_thread(make, False)
        if spec is None:
            return None
        try:
            return await self._compile(spec, vocab_size, owner)
        except RequestError:
            # A schema that nobody asked to enforce may be the one that does not compile.
            looser = await asyncio.to_thread(make, True)
            if looser is None or looser == spec:
                raise
            return await self._compile(looser, vocab_size, owner)

    def close(self) -> None:
        """Ends the process that compiles, if there is one."""
        with self._lock:
            if self._compiler is not None:
                self._compiler.close()

    async def _compile(self, spec: GrammarSpec, vocab_size: int, owner: str) -> CompiledGrammar:
        compiler = self._at(vocab_size, spec.field)
        future = await asyncio.to_thread(compiler.submit, spec, owner)
        while future.cancelled():  # the last who had waited for it left just then
            future = await asyncio.to_thread(compiler.submit, spec, owner)
        self._wanted[future] += 1
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        finally:  # others may wait for the same one
            self._wanted[future] -= 1
            if not self._wanted[future]:
                del self._wanted[future]
                if not future.done():
                    compiler.abandon(future)

    def _at(self, vocab_size: int, field: str) -> GrammarCompiler:
        if self._tokenizer is None:
            why = f"{field}: this server has no tokenizer"
            raise RequestError(why, field=field, code="unsupported_parameter")
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self._tokenizer, vocab_size)
            return self._compiler


def _needs_grammar(tools: Sequence[Tool], choice: ToolChoice) -> bool:
    if choice.mode == "none":
        return False
    forced = choice.mode == "required" or choice.name is not None
    return forced or any(tool.strict or tool.grammar for tool in tools)
