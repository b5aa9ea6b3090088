# SPDX-License-Identifier: MIT
"""Responses in the background: polled, followed, streamed again, cancelled, deleted while at it."""

import asyncio

from tests.gateway.harness import gateway
from tests.gateway.response_events import check_response, check_stream, parse
from tests.gateway.scripted import Scripted
from tests.gateway.test_responses import HERMES, PATH, TEMPLATE

LONG = "many words " * 300


def served(*answers, **kwargs):
    return gateway(echo=Scripted(*answers, **kwargs), template=TEMPLATE, config=HERMES)


async def start(g, **body):
    reply = await g.post(PATH, {"input": "hi", "background": True} | body)
    assert reply.status_code == 200, reply.text
    return check_response(reply.json())


async def get(g, made):
    reply = await g.http.get(f"{PATH}/{made['id']}")
    assert reply.status_code == 200, reply.text
    return check_response(reply.json())


async def finished(g, made):
    while (found := await get(g, made))["status"] == "in_progress":
        await asyncio.sleep(0.001)
    return found


async def test_a_client_comes_back_for_the_answer():
    async with served("<think>so</think>héllo") as g:
        g.client.paused = True
        made = await start(g)
        assert (made["status"], made["output"]) == ("in_progress", [])
        listed = (await g.http.get(f"{PATH}/{made['id']}/input_items")).json()
        assert listed["data"][0]["content"][0]["text"] == "hi"
        g.client.paused = False
        found = await finished(g, made)
        assert found["status"] == "completed"
        assert found["background"] is True
        assert [item["type"] for item in found["output"]] == ["reasoning", "message"]
        again = await g.post(f"{PATH}/{made['id']}/cancel")
        assert again.json() == found


async def test_what_there_is_can_be_seen_on_the_way():
    async with served(LONG) as g:
        made = await start(g)
        while not (found := await get(g, made))["output"]:
            await asyncio.sleep(0)
        assert found["status"] == "in_progress"
        text = found["output"][0]["content"][0]["text"]
        assert LONG.startswith(text)
        assert 0 < len(text) < len(LONG)
        whole = await finished(g, made)
        assert whole["output"][0]["content"][0]["text"] == LONG


async def test_cancelled_while_it_runs():
    async with served(LONG) as g:
        made = await start(g)
        while not (await get(g, made))["output"]:
            await asyncio.sleep(0)
        stopped = check_response((await g.post(f"{PATH}/{made['id']}/cancel")).json())
        assert stopped["status"] == "cancelled"
        assert stopped["output"][0]["status"] == "incomplete"
        assert await get(g, made) == stopped
        assert g.service.responses.running == {}
        await asyncio.sleep(0.01)
        assert g.echo.num_aborted == 1


async def test_cancelled_before_it_runs():
    async with served(LONG) as g:
        g.client.paused = True
        made = await start(g)
        stopped = (await g.post(f"{PATH}/{made['id']}/cancel")).json()
        assert (stopped["status"], stopped["output"]) == ("cancelled", [])
        g.client.paused = False


async def test_deleted_while_it_runs():
    async with served(LONG) as g:
        made = await start(g)
        gone = await g.http.delete(f"{PATH}/{made['id']}")
        assert gone.json()["deleted"] is True
        assert (await g.http.get(f"{PATH}/{made['id']}")).status_code == 404
        assert g.service.responses.num_bytes == 0


async def test_streams_can_be_read_again_from_anywhere():
    async with served("<think>so</think>héllo wörld") as g:
        reply = await g.post(PATH, {"input": "hi", "background": True, "stream": True})
        events = parse(reply.text)
        final = check_stream(events)
        url = f"{PATH}/{final['id']}?stream=true"
        assert parse((await g.http.get(url)).text) == events
        for after in (0, 5, len(events) - 2):
            part = parse((await g.http.get(f"{url}&starting_after={after}")).text)
            assert part == events[after + 1 :]
        assert parse((await g.http.get(f"{url}&starting_after={len(events) - 1}")).text) == []
        assert (await g.http.get(f"{url}&starting_after=-1")).status_code == 400


async def test_a_second_reader_follows_what_still_runs():
    async with served(LONG) as g:
        first = asyncio.create_task(
            g.post(PATH, {"input": "hi", "background": True, "stream": True})
        )
        while not g.service.responses.running:
            await asyncio.sleep(0)
        [(_, response_id)] = g.service.responses.running
        second = await g.http.get(f"{PATH}/{response_id}?stream=true")
        assert parse(second.text) == parse((await first).text)
        check_stream(parse(second.text))


async def test_the_answer_goes_on_when_its_client_leaves():
    async with served(LONG) as g:
        body = {"input": "hi", "background": True, "stream": True}
        reader = asyncio.create_task(g.post(PATH, body))
        while not g.service.responses.running:
            await asyncio.sleep(0)
        [(_, response_id)] = g.service.responses.running
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        found = await finished(g, {"id": response_id})
        assert found["status"] == "completed"


async def test_failures_are_found_later():
    async with served("x", error="it broke") as g:
        found = await finished(g, await start(g))
        assert found["error"] == {"code": "server_error", "message": "it broke"}
        long = await finished(g, await start(g, input="word " * 5000))
        assert long["status"] == "failed"
        assert long["error"]["code"] == "invalid_prompt"
        assert "maximum context length" in long["error"]["message"]


async def test_only_so_many_at_once_and_only_stored():
    async with served("x") as g:
        g.client.paused = True
        for _ in range(64):
            await start(g)
        reply = await g.post(PATH, {"input": "hi", "background": True})
        assert reply.status_code == 429
        g.client.paused = False
        reply = await g.post(PATH, {"input": "hi", "background": True, "store": False})
        assert reply.json()["error"]["param"] == "background"
        while g.service.responses.running:
            await asyncio.sleep(0.001)
