# SPDX-License-Identifier: MIT
"""Several gateway processes on one port: whichever accepts, the one that has the state answers."""

import asyncio
import contextlib
import json
import signal
import time
from types import SimpleNamespace

import httpx
import psutil
import pytest

from tests.gateway.processes import BODY, TEXT, Server, limits, server, start_streams
from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.gateway.limits import Limiter, Limits
from tokenspeed.gateway.server import serve
from tokenspeed.gateway.siblings import Siblings
from tokenspeed.gateway.tenants import Tenant

TWO = ("--num-gateways", "2")
CHAT, ITEMS = "/v1/chat/completions", "/v1/responses"


def further(s) -> list[psutil.Process]:
    children = psutil.Process(s.process.pid).children()
    return [c for c in children if "tokenspeed.gateway.further" in c.cmdline()]


def connections(s) -> dict[int, int]:
    """Open connections of clients, by gateway process."""
    found = {}
    for process in (psutil.Process(s.process.pid), *further(s)):
        own = [c for c in process.net_connections("tcp") if c.laddr.port == s.port]
        found[process.pid] = sum(c.status == "ESTABLISHED" for c in own)
    return found


async def until_all_listen(s) -> None:
    """A further gateway may be slower to start than the engine."""
    async with httpx.AsyncClient(limits=limits(64), timeout=30) as client:
        # What is asked by name waits for its gateway, and so shows that it is there.
        await asyncio.gather(*(chat(client, s, f"warm {i}", f"w{i}") for i in range(12)))


async def chat(client, s, text: str, session: str | None = None, **change):
    headers = {} if session is None else {"session-id": session}
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "ignore_eos": True}
    reply = await client.post(s.url + CHAT, json=body | change, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


@contextlib.asynccontextmanager
async def new_client():
    """Every request on a connection of its own, so that any process may accept it."""
    apart = httpx.Limits(max_connections=64, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=apart, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def shared():
    """One server for the tests that do it no harm."""
    with server("--step-s", "0.002", *TWO) as made:
        asyncio.run(until_all_listen(made))
        yield made


async def test_both_serve_and_a_stream_is_whole_wherever_it_goes(shared):
    async with httpx.AsyncClient(limits=limits(64), timeout=30) as client:

        async def stream(i: int) -> str:
            body = {"messages": [{"role": "user", "content": f"a b {i}"}], "max_tokens": 400}
            body |= {"stream": True, "ignore_eos": True}
            parts = []
            async with client.stream("POST", shared.url + CHAT, json=body) as r:
                assert r.status_code == 200
                async for part in r.aiter_text():
                    parts.append(part)
            return "".join(parts)

        tasks = [asyncio.create_task(stream(i)) for i in range(32)]
        await asyncio.sleep(0.4)
        held = connections(shared)
        texts = await asyncio.gather(*tasks)
    assert len(held) == 2
    assert min(held.values()) >= 4, held
    for text in texts:
        assert text.endswith("data: [DONE]\n\n")
        assert text.count('"finish_reason":"length"') == 1


async def test_a_session_has_one_place_whoever_accepts(shared):
    async with new_client() as client:
        for _ in range(6):
            await asyncio.gather(*(chat(client, shared, "hello", f"one{i}") for i in range(4)))
        listed = (await client.get(shared.url + "/v1/sessions")).json()["data"]
        turns = {one["session"]: one["turns"] for one in listed if one["session"][:3] == "one"}
        assert turns == dict.fromkeys(("one0", "one1", "one2", "one3"), 6)
        seen = [one["last_seen"] for one in listed]
        assert seen == sorted(seen, reverse=True)
        for one in (o for o in listed if o["session"][:3] == "one"):
            for key in (one["session"], one["id"]):
                for _ in range(3):
                    reply = await client.get(f"{shared.url}/v1/sessions/{key}")
                    assert reply.json()["turns"] == 6
            dropped = await client.delete(f"{shared.url}/v1/sessions/{one['id']}")
            assert dropped.json()["deleted"] is True
        left = (await client.get(shared.url + "/v1/sessions")).json()["data"]
        assert not [one for one in left if one["session"][:3] == "one"]
        missing = await client.get(shared.url + "/v1/sessions/nobody")
        assert missing.status_code == 404


@pytest.mark.parametrize("session", [None, "talk"])
async def test_the_next_turn_finds_the_ids_of_the_last_whoever_accepts(shared, session):
    async with new_client() as client:
        for i in range(6):
            named = None if session is None else f"{session}{i}"
            first = await chat(client, shared, f"talk {session} {i}", named, max_tokens=20)
            said = first["choices"][0]["message"]["content"]
            turns = [
                {"role": "user", "content": [{"type": "text", "text": f"talk {session} {i}"}]},
                {"role": "assistant", "content": said},
                {"role": "user", "content": "go on"},
            ]
            then = await chat(client, shared, "", named, messages=turns, cache_receipt=True)
            receipt = then["usage"]["cache_receipt"]
            assert receipt["first_divergent_token"] is None
            assert receipt["expected"] >= first["usage"]["total_tokens"] - 1


async def test_responses_are_found_whoever_has_them(shared):
    async with new_client() as client:
        ids = []
        for i in range(6):
            body = {"input": f"hello {i}", "max_output_tokens": 16}
            reply = await client.post(shared.url + ITEMS, json=body)
            assert reply.status_code == 200, reply.text
            ids.append(reply.json()["id"])
        for one in ids:
            for _ in range(3):
                reply = await client.get(f"{shared.url}{ITEMS}/{one}")
                assert (reply.status_code, reply.json()["id"]) == (200, one)
            body = {"input": "more", "previous_response_id": one, "max_output_tokens": 16}
            # Whatever else says where it belongs: the response that it continues says more.
            headers = {"session-id": f"fork of {one}"}
            reply = await client.post(shared.url + ITEMS, json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            gone = await client.delete(f"{shared.url}{ITEMS}/{one}")
            assert gone.json()["deleted"] is True
            assert (await client.get(f"{shared.url}{ITEMS}/{one}")).status_code == 404


async def test_a_background_response_is_cancelled_wherever_it_runs(shared):
    async with new_client() as client:
        for i in range(4):
            body = {"input": f"long {i}", "max_output_tokens": 3000, "background": True}
            body["ignore_eos"] = True
            made = (await client.post(shared.url + ITEMS, json=body)).json()
            assert made["status"] == "in_progress"
            reply = await client.post(f"{shared.url}{ITEMS}/{made['id']}/cancel")
            assert reply.json()["status"] == "cancelled"


async def test_metrics_are_sums(shared):
    async with new_client() as client:
        for _ in range(3):
            before = shared.gauge("vllm:generation_tokens_total")
            firsts = shared.gauge("vllm:time_to_first_token_seconds_count")
            await asyncio.gather(*(chat(client, shared, f"sum {i}") for i in range(10)))
            assert shared.gauge("vllm:generation_tokens_total") == before + 30
            assert shared.gauge("vllm:time_to_first_token_seconds_count") == firsts + 10


async def test_what_is_wrong_is_answered_wherever_it_goes(shared):
    cases = [
        ("POST", CHAT, b"{", 400, "invalid_json"),
        ("POST", CHAT, b"[]", 400, "invalid_type"),
        ("POST", CHAT, b'{"messages": 3}', 400, "invalid_type"),
        ("POST", ITEMS, b'{"input": 3}', 400, None),
        ("POST", ITEMS, b'{"previous_response_id": "resp_0", "input": "x"}', 404, None),
        ("GET", f"{ITEMS}/resp_0", b"", 404, "response_not_found"),
        ("GET", "/nowhere", b"", 404, "not_found"),
        ("PUT", CHAT, b"", 405, "method_not_allowed"),
    ]
    headers = {"content-type": "application/json", "session-id": "wrong"}
    async with new_client() as client:
        for method, path, body, status, code in cases:
            for _ in range(6):
                reply = await client.request(
                    method, shared.url + path, content=body, headers=headers
                )
                assert reply.status_code == status, reply.text
                assert code in (None, reply.json()["error"]["code"])


async def test_requests_in_a_row_on_one_connection_go_each_to_their_place(shared):
    async with httpx.AsyncClient(timeout=30, limits=limits(1)) as client:
        for i in range(20):
            answer = await chat(client, shared, f"row {i}", f"row{i}")
            assert answer["usage"]["completion_tokens"] == 3


async def test_pipelined_requests_are_answered_or_refused_visibly(shared):
    for i in range(8):
        body = json.dumps({"messages": [{"role": "user", "content": f"p {i}"}], "max_tokens": 2})
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        one = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", shared.port)
        writer.write(one + b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        async with asyncio.timeout(20):
            data = await reader.read()
        writer.close()
        assert data.startswith(b"HTTP/1.1 200 ")
        whole = data.count(b"HTTP/1.1 200 ") == 2
        assert whole or b"connection: close" in data


async def test_a_client_that_leaves_ends_its_request_wherever_it_is(shared):
    async with httpx.AsyncClient(timeout=30, limits=limits(32)) as client:
        tasks = await start_streams(client, shared.url, 8, max_tokens=4000)
        chats = [
            asyncio.create_task(chat(client, shared, f"leave {i}", max_tokens=3000))
            for i in range(8)
        ]
        await asyncio.sleep(0.3)
        for task in (*tasks, *chats):
            task.cancel()
        await asyncio.gather(*tasks, *chats, return_exceptions=True)
    deadline = time.monotonic() + 5
    while shared.gauge("vllm:num_requests_running") and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert shared.gauge("vllm:num_requests_running") == 0


async def test_kill_of_a_further_gateway_loses_only_what_it_had():
    with server("--step-s", "0.01", *TWO) as s:
        await until_all_listen(s)
        async with httpx.AsyncClient(limits=limits(64), timeout=60) as client:
            tasks = await start_streams(client, s.url, 16, max_tokens=300)
            sessions = [
                asyncio.create_task(chat(client, s, f"kill {i}", f"k{i}", max_tokens=300))
                for i in range(12)
            ]
            await asyncio.sleep(0.3)
            (process,) = further(s)
            lost = connections(s)[process.pid]
            assert lost >= 2
            process.kill()
            killed = time.monotonic()
            while s.ready() == 200:
                await asyncio.sleep(0.02)
            assert time.monotonic() - killed < 2.0
            done = await asyncio.gather(*tasks, *sessions, return_exceptions=True)
        broken = 0
        for one in done:
            failed = isinstance(one, Exception) or (isinstance(one, tuple) and one[2])
            broken += bool(failed)
            if isinstance(one, tuple) and not one[2]:
                assert one[0].endswith("data: [DONE]\n\n")
                assert '"finish_reason":"length"' in one[0]
        assert broken == lost
        assert s.process.wait(10) == 1


async def test_keys_and_limits_hold_over_all_and_sigterm_to_the_group_drains_all(tmp_path):
    file = tmp_path / "tenants.json"
    many = [{"name": f"t{i}", "keys": [f"k{i}"], "requests_per_minute": 5} for i in range(3)]

    def write():
        free = {"name": "free", "keys": ["free"], "roles": ["inference", "metrics", "admin"]}
        file.write_text(json.dumps({"tenants": [*many, free]}))

    write()
    flags = ("--step-s", "0.005", "--drain-timeout-s", "60", *TWO, "--tenants", str(file))
    with server(*flags) as s:
        async with new_client() as client:

            async def statuses(key: str) -> list[int]:
                body = {"prompt": "hello", "max_tokens": 1}
                headers = {"x-api-key": key}
                asked = [client.post(s.url + TEXT, json=body, headers=headers) for _ in range(8)]
                return sorted(reply.status_code for reply in await asyncio.gather(*asked))

            assert (await client.post(s.url + TEXT, json=BODY)).status_code == 401
            for i in range(3):
                assert await statuses(f"k{i}") == [200] * 5 + [429] * 3
            many[0]["requests_per_minute"] = 1000
            write()
            s.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.5)
            assert await statuses("k0") == [200] * 8
            client.headers["x-api-key"] = "free"
            tasks = [
                asyncio.create_task(chat(client, s, f"t {i}", f"t{i}", max_tokens=400))
                for i in range(16)
            ]
            await asyncio.sleep(0.6)
            assert min(connections(s).values()) >= 1
            for process in further(s):
                process.send_signal(signal.SIGTERM)
            s.process.terminate()
            while s.ready() == 200:
                await asyncio.sleep(0.01)
            for answer in await asyncio.gather(*tasks):
                assert answer["usage"]["completion_tokens"] == 400
        assert s.process.wait(10) == 0


async def test_the_end_of_the_engine_ends_all():
    with server("--step-s", "0.01", *TWO) as s:
        await until_all_listen(s)
        async with httpx.AsyncClient(limits=limits(64), timeout=60) as client:
            tasks = await start_streams(client, s.url, 16, max_tokens=3000)
            s.engine().kill()
            for text, _, error in await asyncio.gather(*tasks):
                assert error is None
                assert json.loads(text.split("\n\n")[-3][6:])["error"]["code"] == "engine_dead"
        assert s.process.wait(15) == 1


def test_nothing_outlives_a_first_gateway_that_is_killed():
    made = Server("--load-s", "60", *TWO)
    while made.ready() != 503 or '"doing":"pretending"' not in httpx.get(made.url + "/ready").text:
        time.sleep(0.02)
    family = psutil.Process(made.process.pid).children(recursive=True)
    made.process.kill()
    made.process.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


@pytest.mark.parametrize("count", [2, 7])
async def test_turns_of_a_conversation_have_one_place(count):
    siblings = Siblings(SimpleNamespace(number=0, count=count), lambda question: False)

    async def place(body, home="turn", tenant=Tenant("web"), **headers):  # noqa: B008
        pairs = [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()]

        async def peek():
            return json.dumps(body).encode()

        call = SimpleNamespace(tenant=tenant, scope={"headers": pairs}, peek=peek, path={})
        return await siblings._owner(call, home)

    def user(text):
        return {"role": "user", "content": text}

    system = {"role": "system", "content": "today it is Monday"}
    for i in range(20):
        parts = [{"type": "text", "text": f"word {i}", "cache_control": {"type": "ephemeral"}}]
        same = [
            {"messages": [system, user(f"word {i}")]},
            {"messages": [user(f"word {i}"), {"role": "assistant", "content": "x"}, user("y")]},
            {"system": "another", "messages": [user(parts)]},
            {"input": f"word {i}"},
            {"input": [user([{"type": "input_text", "text": f"word {i}"}])]},
        ]
        assert len({await place(body) for body in same}) == 1
        told = [{"prompt_cache_key": f"s{i}"}, {"metadata": {"user_id": f"me_session_s{i}"}}]
        named = {await place(body) for body in told} | {await place({}, session_id=f"s{i}")}
        assert len(named) == 1
        assert named == {await place(same[0], "named", session_id=f"s{i}")}
        limited = Tenant("web", limiter=Limiter(Limits(requests_per_minute=i + 1)))
        assert len({await place(body, tenant=limited) for body in (*same, *told)}) == 1
    assert len({await place({"messages": [user(f"{i}")]}) for i in range(100)}) == count
    assert await place({"prompt": "x"}, "named") is None
    assert await place([], "turn") is None
    assert await place({"messages": []}) is None
    assert await place({"input": 3}, "items") is None


def test_more_than_there_are_numbers_for_are_refused():
    with pytest.raises(ValueError, match="num_gateways must be at most 64"):
        serve(EngineConfig.of(), ServerOptions(num_gateways=65))
