# SPDX-License-Identifier: MIT
"""The route table: every path, its handler and who may call it. Nothing else adds a route."""

from functools import partial
from typing import Any

from tokenspeed.gateway import dashboard, responses
from tokenspeed.gateway import sessions_routes as sessions
from tokenspeed.gateway import small_routes as small
from tokenspeed.gateway.app import RouteSpec
from tokenspeed.gateway.messages import count_tokens, messages
from tokenspeed.gateway.messages_error import failure
from tokenspeed.gateway.messages_schema import MessagesRequest
from tokenspeed.gateway.openai_chat import chat_completions
from tokenspeed.gateway.openai_completions import CompletionRequest, completions
from tokenspeed.gateway.openai_schema import ChatRequest
from tokenspeed.gateway.openapi import openapi_route
from tokenspeed.gateway.responses_schema import ResponsesRequest
from tokenspeed.gateway.service import Service
from tokenspeed.gateway.tenants import ROLES


def route_table(service: Service) -> list[RouteSpec]:
    """All routes, those for administration too (see `RouteSpec.admin`)."""

    def on(method: str, path: str, handler: Any, summary: str, **rest: Any) -> RouteSpec:
        return RouteSpec(method, path, partial(handler, service), summary, **rest)

    one, own = "/v1/sessions/{session}", {"roles": ("inference", "admin")}
    rule: dict[str, Any] = {"admin": True, "roles": ("admin",), "home": "first"}
    watch = rule | {"roles": ("metrics",)}
    seen: dict[str, Any] = {"admin": True, "open": True}  # it is the same for every server
    one_of: dict[str, Any] = own | {"home": "session"}
    all_of: dict[str, Any] = own | {"home": "first"}
    pin = one_of | {"body": sessions.PinRequest}
    work: dict[str, Any] = {"metered": True, "home": "turn"}
    chat, text = work | {"body": ChatRequest}, work | {"body": CompletionRequest, "home": "named"}
    to_ids, to_text = {"body": small.TokenizeRequest}, {"body": small.DetokenizeRequest}
    blocks: dict[str, Any] = {"body": MessagesRequest, "failure": failure}
    items = work | {"body": ResponsesRequest, "home": "items"}
    kept, held = "/v1/responses/{response_id}", {"home": "response"}
    table = [
        on("POST", "/v1/chat/completions", chat_completions, "Answer a conversation", **chat),
        on("POST", "/v1/completions", completions, "Continue a text", **text),
        on("POST", "/v1/messages", messages, "Answer messages of blocks", **(work | blocks)),
        on("POST", "/v1/messages/count_tokens", count_tokens, "Count their tokens", **blocks),
        on("GET", "/v1/sessions", sessions.list_sessions, "Conversations at work", **all_of),
        on("GET", one, sessions.get_session, "One of them", **one_of),
        on("POST", f"{one}/pin", sessions.pin_session, "Keep what it has cached", **pin),
        on("DELETE", one, sessions.drop_session, "Drop what it has cached", **one_of),
        on("POST", "/v1/responses", responses.create_response, "Answer items", **items),
        on("GET", kept, responses.get_response, "A response", **held),
        on("DELETE", kept, responses.delete_response, "Forget a response", **held),
        on("POST", f"{kept}/cancel", responses.cancel_response, "Stop a response", **held),
        on("GET", f"{kept}/input_items", responses.list_input_items, "A response's input", **held),
        on("GET", "/v1/models", small.models, "The models served"),
        on("GET", "/v1/models/{model:path}", small.models, "One model"),
        on("POST", "/tokenize", small.tokenize, "Text to ids", **to_ids),
        on("POST", "/detokenize", small.detokenize, "Ids to text", **to_text),
        on("GET", "/version", small.version, "The server's version", roles=ROLES),
        on("GET", "/health", small.health, "Liveness", open=True),
        on("GET", "/ready", small.readiness, "Readiness and loading progress", open=True),
        on("GET", "/metrics", small.metrics, "Prometheus metrics", **watch),
        on("GET", "/dashboard", dashboard.page, "What the server does, as a page", **seen),
        on("GET", "/dashboard/events", dashboard.events, "The same as events", **rule),
        on("GET", "/dashboard/files/{file}", dashboard.part, "A file of the page", **seen),
        on("POST", "/flush_cache", small.flush_cache, "Forget cached pages", **rule),
    ]
    return [*table, openapi_route(table)]
