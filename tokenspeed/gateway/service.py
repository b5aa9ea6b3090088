# SPDX-License-Identifier: MIT
"""`Service`: what handlers share: the model's names, its text side, the engines, the keys.

Knows no dialect. Text work leaves the event loop: a conversation is rendered in another process,
and a long prompt is encoded in a thread that holds no interpreter lock.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tokenspeed.errors import ContextLengthError, RequestError
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.engine_pool import EnginePool
from tokenspeed.gateway.identity import Caller
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.responses_store import ResponseStore
from tokenspeed.gateway.sessions import Sessions
from tokenspeed.text.channels import Format
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.prompt import Prompt
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

_SHORT_TEXT = 2048  # characters that are encoded at once, on the event loop
_PROMPT_END = 512  # characters that say in which channel an answer begins


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
    responses: ResponseStore = field(default_factory=ResponseStore)
    created: int = field(default_factory=lambda: int(time.time()))
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "text"))

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.keys.pseudonym)
        added = set() if self.tokenizer is None else set(self.tokenizer.added_tokens.values())
        self.markers = frozenset(self.format.markers)
        self.marker_tokens = self.markers & added

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
        if ready and len(text) > ready.max_model_len * tokenizer.max_chars_per_token:
            raise ContextLengthError(
                f"This model's maximum context length is {ready.max_model_len} tokens. However,"
                f" your prompt has {len(text)} characters, which cannot fit.",
                -(-len(text) // tokenizer.max_chars_per_token),
                ready.max_model_len,
                field=field_name,
            )
        if len(text) < _SHORT_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, tokenizer.encode, text, add_special_tokens)

    async def prompt(self, conversation: Conversation, caller: Caller) -> Prompt:
        """A conversation's ids, by the model's template."""
        template, options = self.template, conversation.options
        if template is None:
            raise RequestError("messages: this server has no tokenizer", field="messages")
        if not conversation.messages:
            raise RequestError("messages: must not be empty", field="messages")
        taken = options.keys() & {"messages", "tools", "add_generation_prompt", "self"}
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {min(taken)} is not an option", field="chat_template_kwargs"
            )

        def render() -> str:
            return template.render(
                conversation.messages,
                tools=[tool.definition() for tool in conversation.tools] or None,
                add_generation_prompt=conversation.add_generation_prompt,
                **options,
            )

        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._threads, render)
        ids = await self.encode(text, conversation.add_special_tokens, "messages")
        return Prompt(ids, self.format.starts_in(text[-_PROMPT_END:]))

    def tokenizer_or_refuse(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this server has no tokenizer: send token ids", field="prompt")
        return self.tokenizer

    def close(self) -> None:
        self.responses.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.template is not None:
            self.template.close()
