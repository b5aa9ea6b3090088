# SPDX-License-Identifier: MIT
"""Spans of finished requests for OpenTelemetry. Knows records and the SDK, which is not needed
until somebody asks for spans.

A request's spans are made when it is over, from the times in its record: nothing is done for them
while tokens come.

    chat demo                the request, a child of the client's traceparent
      render                 arrival -> the prompt's ids
      queue                  submitted -> the engine's first step
      prefill                the first step -> the first token
      decode                 the first token -> the last
        parse_tools          the first tool call begins -> the last token

Names are those of the semantic conventions for generative AI; there are no contents.
"""

import re
import time
from typing import TYPE_CHECKING, Any

from tokenspeed.gateway.request_log import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

MAX_WAITING = 2048  # spans that are not sent yet; more are dropped
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")


class Tracing:
    """An observer of requests that makes spans of them."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._provider = trace, provider
        self._tracer = provider.get_tracer("tokenspeed")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord) -> None:
        pass

    def finish(self, record: RequestRecord) -> None:
        """The record's spans."""
        r, kinds = record, self._trace.SpanKind
        to_wall = time.time_ns() - time.monotonic_ns()

        def span(name: str, parent: Any, start: float, end: float, **more: Any) -> "Span":
            made = self._tracer.start_span(
                name, parent, start_time=to_wall + round(start * 1e9), **more
            )
            made.end(to_wall + round(max(start, end) * 1e9))
            return made

        given = {"traceparent": r.traceparent} if _TRACEPARENT.fullmatch(r.traceparent) else {}
        parent = self._propagator.extract(given)
        root = self._tracer.start_span(
            f"{_operation(r)} {r.model}",
            parent,
            kind=kinds.SERVER,
            attributes=_attributes(r),
            start_time=to_wall + round(r.arrived * 1e9),
        )
        if r.status >= 500 or (r.error and r.status < 400):
            root.set_status(self._trace.Status(self._trace.StatusCode.ERROR, r.error))
        inside = self._trace.set_span_in_context(root)
        if r.prompted:
            span("render", inside, r.arrived, r.prompted)
        if r.submitted and r.first:
            # What is left of the way to the first token, the wires' share too, is the queue's.
            began = max(r.submitted, r.first - r.prefill_s) if r.prefill_s else r.submitted
            if r.prefill_s:
                span("queue", inside, r.submitted, began)
            span("prefill", inside, began, r.first)
            decode = span("decode", inside, r.first, r.last)
            if r.first_call:
                below = self._trace.set_span_in_context(decode)
                calls = {"tokenspeed.tool_calls": r.num_calls}
                span("parse_tools", below, r.first_call, r.last, attributes=calls)
        root.end(to_wall + round(r.finished * 1e9))

    def close(self) -> None:
        """Sends what has not been sent, and waits for it for a while."""
        self._provider.shutdown()


def tracing_to(endpoint: str) -> Tracing:
    """Sends spans to an OTLP collector over HTTP.

    Raises `ValueError` if that is no URL or if the SDK is not installed.
    """
    if not _URL.fullmatch(endpoint):
        raise ValueError(f"otlp_endpoint must be an http or https URL: {endpoint[:200]!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ValueError(
            "otlp_endpoint needs OpenTelemetry: pip install 'tokenspeed[tracing]'"
        ) from None
    # A collector's own address goes with the path that the protocol gives it.
    bare = endpoint.partition("://")[2].rstrip("/").count("/") == 0
    url = endpoint.rstrip("/") + "/v1/traces" if bare else endpoint
    provider = TracerProvider(resource=Resource({"service.name": "tokenspeed"}))
    exporter = OTLPSpanExporter(endpoint=url, timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_WAITING))
    return Tracing(provider)


def _operation(record: RequestRecord) -> str:
    return "text_completion" if record.route == "completions" else "chat"


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """What is known of the request. Counts are there only if it came to the engine."""
    r = record
    made: dict[str, Any] = {
        "gen_ai.operation.name": _operation(r),
        "gen_ai.provider.name": "tokenspeed",
        "gen_ai.request.model": r.model,
        "http.route": f"/v1/{r.route}",
        "http.response.status_code": r.status,
        "gen_ai.conversation.id": r.session,
        "error.type": r.error,
        "tokenspeed.request.id": r.id,
        "tokenspeed.tenant": r.tenant,
        "tokenspeed.client": r.client,
        "tokenspeed.cache.reason": r.reason,
    }
    if r.submitted:
        made |= {
            "gen_ai.response.model": r.model,
            "gen_ai.response.finish_reasons": r.finish.split(","),
            "gen_ai.usage.input_tokens": r.num_prompt,
            "gen_ai.usage.output_tokens": r.num_output,
            "gen_ai.usage.cache_read.input_tokens": r.num_cached,
        }
    if r.first:
        made["gen_ai.response.time_to_first_chunk"] = r.first - r.arrived
        made["tokenspeed.accepted_length"] = r.num_output / r.num_steps
    return {name: value for name, value in made.items() if value not in ("", None)}
