# SPDX-License-Identifier: MIT
"""Who may call what: keys over the whole route table, salts, hosts; secrets stay secret."""

import json

import pytest
import zmq

from tests.gateway.harness import gateway
from tokenspeed.config import ServerOptions
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.gateway.app import Application
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.server import _listener, _unix_listener
from tokenspeed.gateway.serving import _public_name, _servers

KEYS = ("first-key", "second-key")
OPEN = {"/health", "/ready", "/dashboard", "/dashboard/files/{file}"}
TEXT = {"prompt": "hello " * 100, "max_tokens": 1}


def url(path: str) -> str:
    return path.replace("{model:path}", "null").replace("{file}", "page.css")


async def test_every_route_but_the_open_ones_needs_a_key():
    async with gateway(keys=KEYS) as g:
        seen = set()
        for spec in g.app.table:
            reply = await g.http.request(spec.method, url(spec.path))
            seen.add(spec.path)
            if spec.path in OPEN:
                assert reply.status_code == 200
            else:
                assert reply.status_code == 401, spec.path
                assert reply.headers["www-authenticate"] == "Bearer"
                error = reply.json()["error"]
                assert error.get("code", error["type"]) in (
                    "invalid_api_key",
                    "authentication_error",
                )
        assert seen >= OPEN
        assert len(seen) >= 12
        # Paths that only look open, and paths that do not exist, tell nothing either.
        for path in ("/health/", "/HEALTH", "//health", "/nothing", "/v1/models?x=/health"):
            assert (await g.http.get(path)).status_code == 401, path
        tricks = {"host": "localhost/health", "x-original-url": "/health"}
        assert (await g.http.get("/v1/models", headers=tricks)).status_code == 401


@pytest.mark.parametrize(
    ("header", "ok"),
    [
        ({"authorization": "Bearer first-key"}, True),
        ({"authorization": "bearer second-key"}, True),
        ({"x-api-key": "second-key"}, True),
        ({"authorization": "Bearer first-ke"}, False),
        ({"authorization": "Bearer first-keyy"}, False),
        ({"authorization": "Basic first-key"}, False),
        ({"authorization": "Bearer "}, False),
        ({"authorization": "Bearer first-key,second-key"}, False),
        ({"x-api-key": ""}, False),
        ({"cookie": "key=first-key"}, False),
    ],
)
async def test_keys(header, ok):
    async with gateway(keys=KEYS) as g:
        reply = await g.http.get("/v1/models", headers=header)
        assert reply.status_code == (200 if ok else 401)
        assert "first-key" not in reply.text
        assert (await g.http.get("/v1/models?api_key=first-key")).status_code == 401


def test_empty_keys_are_refused_at_start():
    with pytest.raises(ValueError, match="api_key"):
        Keys(("good", " "))


async def test_tenants_share_no_cached_prefix():
    async with gateway(keys=KEYS) as g:

        async def cached(key, **more):
            reply = await g.post("/v1/completions", {**TEXT, **more}, headers={"x-api-key": key})
            return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert await cached("first-key") == 0
        assert await cached("first-key") > 0
        assert await cached("second-key") == 0
        assert await cached("second-key", cache_salt="a") == 0
        assert await cached("first-key", cache_salt="a") == 0
        assert await cached("first-key", cache_salt="a") > 0
        salts = {s.salt for s in g.client.sent if isinstance(s, GenerateRequest)}
        assert len(salts) == 4
        assert all(len(salt) == 16 and b"key" not in salt for salt in salts)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("app.localhost", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("10.0.0.1", 403),
        ("", 403),
    ],
)
async def test_without_keys_only_loopback_names_are_served(host, status):
    async with gateway() as g:
        reply = await g.http.get("/v1/models", headers={"host": host})
        assert reply.status_code == status
    async with gateway(keys=KEYS) as g:
        headers = {"host": host, "x-api-key": "first-key"}
        assert (await g.http.get("/v1/models", headers=headers)).status_code == 200


def test_a_folders_path_is_not_its_name(tmp_path):
    assert _public_name(str(tmp_path)) == tmp_path.name
    assert _public_name("org/model") == "org/model"
    assert _public_name("demo") == "demo"


async def test_no_cors_headers():
    async with gateway() as g:
        reply = await g.http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert not [name for name in reply.headers if name.startswith("access-control")]
        assert (await g.http.options("/v1/models")).status_code == 405


def test_two_listeners_never_share_a_port():
    # Bound and not yet listening, sockets with SO_REUSEADDR would let each other in.
    with _listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port}"):
            _listener("127.0.0.1", port)


def test_a_unix_socket_is_taken_over_only_from_the_dead(tmp_path):
    path = str(tmp_path / "socket")
    with _unix_listener(path), pytest.raises(OSError, match="in use"):
        _unix_listener(path)
    _unix_listener(path).close()  # the first one is gone, its file is not


async def test_admin_routes_move_to_their_own_listener():
    async with gateway() as g:
        table = list(g.app.table)
        keys = g.service.keys
    (one,) = _servers(ServerOptions(), keys, table)
    both = _servers(ServerOptions(admin_port=9000), keys, table)
    apps = [server.config.app for server in (one, *both)]
    assert all(isinstance(app, Application) for app in apps)
    paths = [{spec.path for spec in app.table} for app in apps]
    moved = {
        "/metrics",
        "/flush_cache",
        "/dashboard",
        "/dashboard/files/{file}",
        "/dashboard/events",
    }
    assert paths[1] == paths[0] - moved
    assert paths[2] == moved | {"/health", "/ready"}


async def test_an_unforeseen_failure_tells_nothing(monkeypatch, caplog):
    async with gateway() as g:

        async def broken(*_):
            raise RuntimeError("secret /root/path 0x7fff")

        monkeypatch.setattr(g.service, "encode", broken)
        reply = await g.post("/v1/completions", TEXT)
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "the server failed on this request"
        monkeypatch.undo()
        assert (await g.post("/v1/completions", TEXT)).status_code == 200
    assert "secret" in caplog.text


async def test_openapi_document_lists_the_route_table():
    async with gateway() as g:
        document = (await g.http.get("/openapi.json")).json()
        table = {(s.path.replace(":path", ""), s.method.lower()) for s in g.app.table}
    found = {(path, method) for path, item in document["paths"].items() for method in item}
    assert found == table
    assert document["openapi"] == "3.1.0"
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert {"temperature", "top_k", "logit_bias"} <= set(chat["properties"])
    assert "security" not in document["paths"]["/health"]["get"]
    assert json.dumps(document).count("$ref") > 10


async def test_a_flush_that_the_engine_has_no_room_for_is_answered_503(monkeypatch):
    async with gateway() as g:

        def full(data: bytes, flags: int) -> None:
            raise zmq.Again

        monkeypatch.setattr(g.client, "send", full)
        reply = await g.http.post("/flush_cache")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in reply.headers
