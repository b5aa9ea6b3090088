# SPDX-License-Identifier: MIT
"""The route table: every path, its handler and who may call it. Nothing else adds a route."""

from functools import partial

from tokenspeed.gateway.app import RouteSpec
from tokenspeed.gateway.openai_chat import chat_completions
from tokenspeed.gateway.openai_completions import completions
from tokenspeed.gateway.openai_schema import ChatRequest, CompletionRequest
from tokenspeed.gateway.openapi import openapi_route
from tokenspeed.gateway.service import DetokenizeRequest, Service, TokenizeRequest


def route_table(service: Service) -> list[RouteSpec]:
    """All routes, those for administration too (see `RouteSpec.admin`)."""
    chat, text = partial(chat_completions, service), partial(completions, service)
    table = [
        RouteSpec("POST", "/v1/chat/completions", chat, "Answer a conversation", ChatRequest),
        RouteSpec("POST", "/v1/completions", text, "Continue a text", CompletionRequest),
        RouteSpec("GET", "/v1/models", service.models, "The models served"),
        RouteSpec("GET", "/v1/models/{model:path}", service.models, "One model"),
        RouteSpec("POST", "/tokenize", service.tokenize, "Text to ids", TokenizeRequest),
        RouteSpec("POST", "/detokenize", service.detokenize, "Ids to text", DetokenizeRequest),
        RouteSpec("GET", "/version", service.version, "The server's version"),
        RouteSpec("GET", "/health", service.health, "Liveness", open=True),
        RouteSpec("GET", "/ready", service.ready, "Readiness and loading progress", open=True),
        RouteSpec("GET", "/metrics", service.metrics_text, "Prometheus metrics", admin=True),
        RouteSpec("POST", "/flush_cache", service.flush_cache, "Forget cached pages", admin=True),
    ]
    return [*table, openapi_route(table)]
