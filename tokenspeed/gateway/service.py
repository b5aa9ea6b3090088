# SPDX-License-Identifier: MIT
"""`Service`: what handlers share: the model's names, its text side, the engines, the keys.

Knows no dialect. Text work leaves the event loop: a conversation is rendered in another process,
and a long prompt is encoded in a thread that holds no interpreter lock.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tokenspeed.config import ServerOptions
from tokenspeed.errors import RequestError
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.dashboard_snapshot import Show, Watch
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.grammars import Grammars
from tokenspeed.gateway.identity import Caller
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.receipt import Expectation, expectation
from tokenspeed.gateway.responses_store import ResponseStore
from tokenspeed.gateway.sessions import Sessions
from tokenspeed.gateway.siblings import Siblings
from tokenspeed.text.call_syntax import SYNTAXES
from tokenspeed.text.channels import Format
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.prompt import Prompt, Prompts, check_length
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

_SHORT_TEXT = 2048  # characters that are encoded at once, on the event loop


@dataclass
class Service:
    """The model as clients see it."""

    names: tuple[str, ...]  # the first is the model's own
    pool: EnginePool
    metrics: Metrics
    keys: Keys
    tokenizer: Tokenizer | None  # None: token ids in, token ids out
    template: TemplateWorker | None
    format: Format
    options: ServerOptions = field(default_factory=ServerOptions)
    responses: ResponseStore = field(default_factory=ResponseStore)
    created: int = field(default_factory=lambda: int(time.time()))
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "text"))

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.keys.pseudonym)
        self.watch, self.show = Watch(self.pool, self.metrics, self.sessions), Show()
        self.siblings: Siblings | None = None  # if there are several gateways
        added = set() if self.tokenizer is None else set(self.tokenizer.added_tokens.values())
        self.markers = frozenset(self.format.markers)
        self.marker_tokens = self.markers & added
        self.no_calls = _no_calls(self.tokenizer, self.format)
        self.grammars = Grammars(self.tokenizer, self.format)
        self.prompts: Prompts | None = None
        if self.tokenizer is not None and self.template is not None:
            self.prompts = Prompts(
                self.tokenizer,
                self.template.render,
                self.format,
                self.options.canonical_rules,
                self.options.history_bytes // self.options.num_gateways,
            )

    def model_name(self, asked: str | None) -> str:
        """The name that the answer carries. Raises 404 for a model that is not served."""
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            raise ApiError(
                404,
                f"the model {asked[:100]!r} does not exist here; served: {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return asked

    async def encode(
        self, text: str, add_special_tokens: bool, field_name: str = "prompt"
    ) -> list[int]:
        """Ids. Refuses a text that cannot fit the context before it is encoded."""
        tokenizer = self.tokenizer_or_refuse()
        ready = self.pool.ready
        check_length(text, tokenizer, ready.max_model_len if ready else None, field_name)
        if len(text) < _SHORT_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, tokenizer.encode, text, add_special_tokens)

    async def prompt(
        self, conversation: Conversation, caller: Caller, cache_salt: str | None = None
    ) -> Prompt:
        """A conversation's ids: as they were sampled, and by the model's template."""
        options = conversation.options
        if self.prompts is None:
            raise RequestError("messages: this server has no tokenizer", field="messages")
        if not conversation.messages:
            raise RequestError("messages: must not be empty", field="messages")
        taken = options.keys() & {"messages", "tools", "add_generation_prompt", "self"}
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {min(taken)} is not an option", field="chat_template_kwargs"
            )

        ready = self.pool.ready
        salt = self.keys.salt(caller.salt, cache_salt) + caller.tenant.encode()
        return await asyncio.get_running_loop().run_in_executor(
            self._threads,
            self.prompts.make,
            conversation,
            salt,
            caller.session,
            ready.max_model_len if ready else None,
        )

    def warm_up(self) -> None:
        """Begins to try out the chat template, so that the first request need not."""
        if self.prompts is not None:
            self._threads.submit(self.prompts.prepare)

    async def expectation(self, prompt: Prompt) -> Expectation:
        """What the session had of a prompt before."""
        if self.prompts is None or self.tokenizer is None:
            return Expectation(0)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, expectation, self.prompts, prompt, self.tokenizer)

    def tokenizer_or_refuse(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this server has no tokenizer: send token ids", field="prompt")
        return self.tokenizer

    def close(self) -> None:
        self.grammars.close()
        self.responses.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.template is not None:
            self.template.close()


def _no_calls(tokenizer: Tokenizer | None, answers: Format) -> list[list[int]]:
    """Words without which no call can begin: the marker that opens one, if it is a token."""
    syntax = SYNTAXES.get(answers.name)
    if tokenizer is None or syntax is None or answers.channels_by_calls:
        return []
    added = tokenizer.added_tokens.items()
    return [[token] for token, text in added if text == syntax.trigger]
