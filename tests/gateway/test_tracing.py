# SPDX-License-Identifier: MIT
"""Spans: their names, order and attributes, the client's trace, and nothing at all without them."""

import subprocess
import sys

import pytest

from tests.gateway.harness import gateway
from tests.gateway.test_request_log import done
from tokenspeed.gateway.request_log import RequestRecord
from tokenspeed.gateway.tracing import Tracing, tracing_to

trace_sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans():
    exporter = memory.InMemorySpanExporter()
    provider = trace_sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    yield tracing, lambda: {span.name: span for span in exporter.get_finished_spans()}
    tracing.close()


def test_a_requests_spans(spans):
    tracing, found = spans
    tracing.finish(done(prompted=10.005, first_call=11.0, num_calls=2))
    made = found()
    root, decode = made["chat demo"], made["decode"]
    assert set(made) == {"chat demo", "render", "queue", "prefill", "decode", "parse_tools"}
    parents = {name: span.parent and span.parent.span_id for name, span in made.items()}
    inside = dict.fromkeys(("render", "queue", "prefill", "decode"), root.context.span_id)
    assert parents == inside | {"chat demo": None, "parse_tools": decode.context.span_id}
    lengths = {name: (s.end_time - s.start_time) / 1e9 for name, s in made.items()}
    wanted = {
        "chat demo": 2.6,
        "render": 0.005,
        "queue": 0.24,
        "prefill": 0.25,
        "decode": 2.0,
        "parse_tools": 1.5,
    }
    assert lengths == pytest.approx(wanted, abs=1e-6)
    assert made["queue"].end_time == made["prefill"].start_time
    assert made["prefill"].end_time == decode.start_time
    assert made["parse_tools"].attributes["tokenspeed.tool_calls"] == 2
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenspeed",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.5,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 41,
        "gen_ai.usage.cache_read.input_tokens": 64,
        "gen_ai.conversation.id": "s1",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "tokenspeed.request.id": "r1",
        "tokenspeed.tenant": "web",
        "tokenspeed.client": "codex",
        "tokenspeed.cache.reason": "diverged",
        "tokenspeed.accepted_length": 41 / 21,
    }


def test_what_did_not_happen_has_no_span(spans):
    tracing, found = spans
    record = RequestRecord(route="completions", model="m", status=503, error="overloaded")
    record.finished = record.arrived + 0.1
    tracing.finish(record)
    (span,) = found().values()
    assert span.name == "text_completion m"
    assert span.status.status_code.name == "ERROR"
    assert span.attributes["error.type"] == "overloaded"


@pytest.mark.parametrize(
    "header", ["", "00", f"00-{TRACE}-{SPAN}", f"00-{'0' * 32}-{SPAN}-01", "x" * 128, "ä"]
)
def test_a_traceparent_that_is_none(spans, header):
    tracing, found = spans
    tracing.finish(done(traceparent=header))
    assert found()["chat demo"].parent is None


async def test_the_clients_trace_goes_on(spans):
    tracing, found = spans
    async with gateway(observers=[tracing]) as g:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "session-id": "s"}
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        await g.post("/v1/chat/completions", body, headers=headers)
    made = found()
    assert set(made) == {"chat null", "render", "prefill", "decode"}
    assert {f"{span.context.trace_id:032x}" for span in made.values()} == {TRACE}
    assert f"{made['chat null'].parent.span_id:016x}" == SPAN
    starts = [made[name].start_time for name in ("chat null", "render", "prefill", "decode")]
    assert starts == sorted(starts)
    assert made["chat null"].end_time >= made["decode"].end_time
    assert "hello" not in str([dict(span.attributes) for span in made.values()])


async def test_tool_calls_have_a_span(spans):
    from tests.gateway.scripted import Scripted

    tracing, found = spans
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
    async with gateway(
        echo=Scripted(text), observers=[tracing], config={"answer_format": "hermes"}
    ) as g:
        reply = await g.post("/v1/chat/completions", body)
        assert reply.json()["choices"][0]["finish_reason"] == "tool_calls"
    made = found()
    assert made["parse_tools"].attributes["tokenspeed.tool_calls"] == 1
    assert made["parse_tools"].parent.span_id == made["decode"].context.span_id


@pytest.mark.parametrize("url", ["", "collector:4318", "ftp://x", "http://", "http://a b"])
def test_a_wrong_endpoint_is_refused(url):
    with pytest.raises(ValueError, match="otlp_endpoint must be"):
        tracing_to(url)


def test_without_the_package_it_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenspeed\[tracing\]'"):
        tracing_to("http://localhost:4318")


def test_no_spans_no_import():
    code = (
        "import sys, tokenspeed.gateway.server\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_collector_gets_them():
    import http.server
    import threading

    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        tracing = tracing_to(f"http://127.0.0.1:{server.server_port}")
        tracing.finish(done())
        tracing.close()
        thread.join(10)
    ((path, data),) = got
    assert path == "/v1/traces"
    assert len(data) > 100
