# SPDX-License-Identifier: MIT
"""The small routes: models, tokens, health, readiness, metrics, version. They generate nothing."""

from datetime import UTC, datetime
from typing import Any

import msgspec

from tokenspeed import __version__
from tokenspeed.errors import RequestError
from tokenspeed.gateway.app import Call, check_depth, encode_json
from tokenspeed.gateway.exposition import exposition
from tokenspeed.gateway.openai_schema import Messages
from tokenspeed.gateway.openai_tools import chat_tools
from tokenspeed.gateway.service import Service
from tokenspeed.text.conversation import Conversation

MAX_TOKENS = 1 << 18  # that are made text at once; it holds up everybody else


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


async def models(service: Service, call: Call) -> None:
    """In OpenAI's and Anthropic's shape at once: they share no field but `id`."""
    ready = service.pool.ready
    limit = ready.max_model_len if ready else None
    since = datetime.fromtimestamp(service.created, UTC).isoformat()
    data = [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "tokenspeed",
            "root": service.names[0],
            "parent": None,
            "max_model_len": limit,
            "type": "model",
            "display_name": name,
            "created_at": since,
            "max_input_tokens": limit,
            "lifecycle": "active",
        }
        for name in service.names
    ]
    asked = call.path.get("model")
    if asked is None:
        page = {"first_id": data[0]["id"], "last_id": data[-1]["id"], "has_more": False}
        await call.reply(encode_json({"object": "list", "data": data} | page))
    else:
        await call.reply(encode_json(data[service.names.index(service.model_name(asked))]))


async def health(service: Service, call: Call) -> None:
    """Liveness: this process answers, and its engine process has not ended."""
    dead = service.pool.state == "dead"
    await call.reply(b'{"status":"%b"}' % (b"dead" if dead else b"ok"), 503 if dead else 200)


async def readiness(service: Service, call: Call) -> None:
    """Readiness: requests are taken now. Tells how far loading is."""
    state = service.pool.state
    loading = service.pool.loading
    fraction = 1.0 if service.pool.ready else loading.fraction
    body: dict[str, Any] = {"status": state, "progress": round(fraction, 3)}
    if state == "loading":
        body["doing"] = loading.what
    headers = {} if state == "ready" else {"retry-after": "2"}
    await call.reply(encode_json(body), 200 if state == "ready" else 503, headers=headers)


async def metrics(service: Service, call: Call) -> None:
    found = service.metrics
    if service.siblings is not None:
        found = found.with_others(await service.siblings.link.ask({"ask": "metrics"}))
    await call.reply(exposition(found), kind="text/plain; version=0.0.4; charset=utf-8")


async def version(service: Service, call: Call) -> None:
    await call.reply(encode_json({"version": __version__}))


async def tokenize(service: Service, call: Call) -> None:
    request = await call.decode(_TOKENIZE)
    service.model_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("prompt: give either prompt or messages", field="prompt")
    if request.messages is not None:
        for name in ("messages", "tools", "chat_template_kwargs"):
            check_depth(getattr(request, name), name)
        conversation = Conversation(
            request.messages,
            chat_tools(request.tools),
            request.chat_template_kwargs or {},
            add_generation_prompt=request.add_generation_prompt is not False,
            add_special_tokens=bool(request.add_special_tokens),
        )
        ids = (await service.prompt(conversation, call.caller())).ids
    else:
        ids = await service.encode(request.prompt or "", request.add_special_tokens is not False)
    limit = service.pool.ready.max_model_len if service.pool.ready else None
    body: dict[str, Any] = {"count": len(ids), "max_model_len": limit, "tokens": ids}
    if request.return_token_strs:
        body["token_strs"] = [service.tokenizer_or_refuse().token_text(i) for i in ids]
    await call.reply(encode_json(body))


async def detokenize(service: Service, call: Call) -> None:
    request = await call.decode(_DETOKENIZE)
    service.model_name(request.model)
    tokenizer = service.tokenizer_or_refuse()
    if len(request.tokens) > MAX_TOKENS:
        raise RequestError(f"tokens: at most {MAX_TOKENS}", field="tokens")
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


async def flush_cache(service: Service, call: Call) -> None:
    service.pool.flush_cache()
    await call.reply(b'{"status":"ok"}')
