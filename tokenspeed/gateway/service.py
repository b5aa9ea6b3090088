# SPDX-License-Identifier: MIT
"""`Service`: what handlers share, and the small routes: models, tokens, health, metrics, version.

Knows the model's names, its text side and the engine client. Text work leaves the event loop: a
long prompt is rendered in another process and encoded in a thread that holds no interpreter lock.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenspeed import __version__
from tokenspeed.errors import RequestError
from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.app import Call, check_depth
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.engine_client import EngineClient
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.openai_schema import Messages
from tokenspeed.gateway.sse import encode_json
from tokenspeed.text.template_worker import TemplateWorker
from tokenspeed.text.tokenizer import Tokenizer

_SHORT_TEXT = 2048  # characters that are encoded at once, on the event loop


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: `prompt`, or `messages` through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


@dataclass
class Service:
    """The model as clients see it."""

    names: tuple[str, ...]  # the first is the model's own
    client: EngineClient
    metrics: Metrics
    keys: Keys
    tokenizer: Tokenizer | None  # None: token ids in, token ids out
    template: TemplateWorker | None
    created: int = field(default_factory=lambda: int(time.time()))
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "text"))

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

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids. Refuses a text that cannot fit the context before it is encoded."""
        tokenizer = self._tokenizer()
        ready = self.client.ready
        if ready and len(text) > ready.max_model_len * tokenizer.max_chars_per_token:
            raise RequestError(
                f"This model's maximum context length is {ready.max_model_len} tokens. However,"
                f" your prompt has {len(text)} characters, which cannot fit.",
                field="prompt",
                code="context_length_exceeded",
            )
        if len(text) < _SHORT_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, tokenizer.encode, text, add_special_tokens)

    async def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        add_special_tokens: bool,
        options: dict[str, Any],
    ) -> list[int]:
        """Ids of a conversation, by the model's template."""
        template = self.template
        if template is None:
            raise RequestError("messages: this server has no tokenizer", field="messages")
        if not messages:
            raise RequestError("messages: must not be empty", field="messages")
        taken = options.keys() & {"messages", "tools", "add_generation_prompt", "self"}
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {min(taken)} is not an option", field="chat_template_kwargs"
            )

        def render() -> str:
            return template.render(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, **options
            )

        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._threads, render)
        return await self.encode(text, add_special_tokens)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this server has no tokenizer: send token ids", field="prompt")
        return self.tokenizer

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.template is not None:
            self.template.close()

    # The small routes.

    async def models(self, call: Call) -> None:
        ready = self.client.ready
        data = [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "tokenspeed",
                "root": self.names[0],
                "parent": None,
                "max_model_len": ready.max_model_len if ready else None,
            }
            for name in self.names
        ]
        asked = call.path.get("model")
        if asked is None:
            await call.reply(encode_json({"object": "list", "data": data}))
        else:
            await call.reply(encode_json(data[self.names.index(self.model_name(asked))]))

    async def health(self, call: Call) -> None:
        """Liveness: this process answers, and its engine process has not ended."""
        dead = self.client.state == "dead"
        await call.reply(b'{"status":"%b"}' % (b"dead" if dead else b"ok"), 503 if dead else 200)

    async def ready(self, call: Call) -> None:
        """Readiness: requests are taken now. Tells how far loading is."""
        state = self.client.state
        loading = self.client.loading
        fraction = 1.0 if self.client.ready else loading.fraction
        body: dict[str, Any] = {"status": state, "progress": round(fraction, 3)}
        if state == "loading":
            body["doing"] = loading.what
        headers = {} if state == "ready" else {"retry-after": "2"}
        await call.reply(encode_json(body), 200 if state == "ready" else 503, headers=headers)

    async def metrics_text(self, call: Call) -> None:
        await call.reply(self.metrics.text(), kind="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, call: Call) -> None:
        await call.reply(encode_json({"version": __version__}))

    async def tokenize(self, call: Call) -> None:
        request = await call.decode(_TOKENIZE)
        self.model_name(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("prompt: give either prompt or messages", field="prompt")
        if request.messages is not None:
            for name in ("messages", "tools", "chat_template_kwargs"):
                check_depth(getattr(request, name), name)
            ids = await self.chat_prompt(
                request.messages,
                tools=request.tools,
                add_generation_prompt=request.add_generation_prompt is not False,
                add_special_tokens=bool(request.add_special_tokens),
                options=request.chat_template_kwargs or {},
            )
        else:
            ids = await self.encode(request.prompt or "", request.add_special_tokens is not False)
        limit = self.client.ready.max_model_len if self.client.ready else None
        body: dict[str, Any] = {"count": len(ids), "max_model_len": limit, "tokens": ids}
        if request.return_token_strs:
            body["token_strs"] = [self._tokenizer().token_text(i) for i in ids]
        await call.reply(encode_json(body))

    async def detokenize(self, call: Call) -> None:
        request = await call.decode(_DETOKENIZE)
        self.model_name(request.model)
        tokenizer = self._tokenizer()
        if request.tokens and not (
            min(request.tokens) >= 0 and max(request.tokens) < tokenizer.vocab_size
        ):
            raise RequestError(
                f"tokens: ids must be in [0, {tokenizer.vocab_size})",
                field="tokens",
                code="invalid_token_id",
            )
        text = tokenizer.decode(request.tokens, skip_special_tokens=False)
        await call.reply(encode_json({"prompt": text}))

    async def flush_cache(self, call: Call) -> None:
        self.client.flush_cache()
        await call.reply(b'{"status":"ok"}')
