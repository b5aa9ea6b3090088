# SPDX-License-Identifier: MIT
"""Several engines behind one gateway, in process: routing, room, failures, metrics."""

import asyncio
import json
import random

import pytest

from benchmarks.null_engine import MAX_MODEL_LEN, PAGE_SIZE, VOCAB_SIZE
from tests.gateway.harness import gateway, parse_events
from tests.gateway.test_lifecycle import BODY, TEXT, Client, until
from tokenspeed.engine import messages as m
from tokenspeed.engine.routing import MIN_BLOCK, REQUEST_TOKENS


def ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1000, 50_000), k=length)


def homes(g, prompt: list[int]) -> list[int]:
    """The engines that were given requests beginning with `prompt`."""
    return [
        number
        for number, client in enumerate(g.clients)
        for request in client.requests
        if request.prompt_ids[: len(prompt)] == prompt
    ]


def series(text: str) -> dict[str, float]:
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return {name: float(value) for name, value in lines}


async def test_sessions_stay_where_they_began_and_are_spread():
    async with gateway(engines=3) as g:
        firsts = [ids(seed, 2 * MIN_BLOCK) for seed in range(6)]
        for turn in range(4):
            for seed, first in enumerate(firsts):
                prompt = first + ids(seed + 100, 150 * turn)
                reply = await g.post(TEXT, {"prompt": prompt, "max_tokens": 2})
                assert reply.status_code == 200, reply.text
        for first in firsts:
            assert len(set(homes(g, first))) == 1
            assert len(homes(g, first)) == 4
        assert [len(client.requests) for client in g.clients] == [8, 8, 8]
        matched = [client.metrics.routing["matched_tokens"] for client in g.clients]
        assert sum(matched) >= 6 * 3 * 2 * MIN_BLOCK
        assert all(client.metrics.routing["overridden"] == 0 for client in g.clients)


async def test_load_overrides_a_prefix():
    async with gateway(engines=2) as g:
        prompt = ids(1, 6 * MIN_BLOCK)
        assert REQUEST_TOKENS < 6 * MIN_BLOCK < 2 * REQUEST_TOKENS  # it outweighs one request
        await g.post(TEXT, {"prompt": prompt, "max_tokens": 1})
        for client in g.clients:
            client.paused = True
        waiting = []
        for number in range(3):
            waiting.append(Client(g, TEXT, {"prompt": prompt + [number] * 9, "max_tokens": 1}))
            await until(lambda: sum(len(c.requests) for c in g.clients) == 1 + len(waiting))
        assert homes(g, prompt) == [0, 0, 0, 1]
        assert [client.metrics.routing["overridden"] for client in g.clients] == [0, 1]
        for client in g.clients:
            client.paused = False
        await asyncio.gather(*(w.task for w in waiting))
        assert all(w.status == 200 for w in waiting)


async def test_the_waiting_prompt_tokens_of_each_engine_are_known():
    async with gateway(engines=2) as g:
        for client in g.clients:
            client.paused = True
        one, two = ids(1, 700), ids(2, 300)
        calls = []
        for prompt in (one, two):
            calls.append(Client(g, TEXT, {"prompt": prompt, "max_tokens": 2, "n": 2}))
            await until(lambda: sum(len(c.requests) for c in g.clients) == 2 * len(calls))
        found = {(c.load.waiting_tokens, c.load.num_requests) for c in g.clients}
        assert found == {(700, 2), (300, 2)}
        calls[0].leave()
        await calls[0].task
        assert sum(c.load.waiting_tokens for c in g.clients) == 300
        for client in g.clients:
            client._up(m.Outputs(client.echo.step()))  # the first tokens: the prompts are done
        assert sum(c.load.waiting_tokens for c in g.clients) == 0
        assert sum(c.load.num_requests for c in g.clients) == 2
        for client in g.clients:
            client.paused = False
        await calls[1].task


async def test_all_answers_to_a_prompt_come_from_one_engine():
    async with gateway(engines=3) as g:
        prompts = [ids(seed, 20) for seed in range(6)]
        body = {"prompt": prompts, "n": 4, "max_tokens": 3, "return_token_ids": True}
        reply = (await g.post(TEXT, body)).json()
        assert [c["index"] for c in reply["choices"]] == list(range(24))
        for index, choice in enumerate(reply["choices"]):
            assert choice["token_ids"] == prompts[index // 4][:3]
        for prompt in prompts:
            assert len(set(homes(g, prompt))) == 1
            assert len(homes(g, prompt)) == 4
        assert [len(client.requests) for client in g.clients] == [8, 8, 8]
        numbers = [request.request_id for c in g.clients for request in c.requests]
        assert len(set(numbers)) == 24


async def test_leaving_and_stop_strings_reach_the_engine_that_has_the_request():
    async with gateway(engines=3) as g:
        stopped = {"prompt": "hello world again", "max_tokens": 1000, "stop": "world"}
        replies = await asyncio.gather(*(g.post(TEXT, stopped) for _ in range(6)))
        assert {r.json()["choices"][0]["text"] for r in replies} == {"hello "}
        assert [len(client.requests) for client in g.clients] == [2, 2, 2]
        assert [client.metrics.finished for client in g.clients] == [{"stop": 2}] * 3
        calls = [Client(g, TEXT, BODY) for _ in range(6)]
        await until(lambda: all(len(c.echo.running) == 2 for c in g.clients))
        for call in calls[:3]:
            call.leave()
            await call.task
        assert sum(client.metrics.finished["abort"] for client in g.clients) == 3
        assert sum(client.load.num_requests for client in g.clients) == 3
        for call in calls[3:]:
            call.leave()
        await asyncio.gather(*(call.task for call in calls))
        for client in g.clients:
            ended = [s.request_id for s in client.sent if isinstance(s, m.AbortRequest)]
            assert set(ended) <= {request.request_id for request in client.requests}
        await until(lambda: not any(c.echo.running for c in g.clients))


async def test_a_full_engine_is_passed_over_and_all_full_is_503():
    config = {"max_num_seqs": 1, "max_queue_len": 2, "max_num_batched_tokens": 8}
    async with gateway(engines=2, config=config) as g:
        for client in g.clients:
            client.paused = True
        prompt = ids(1, 12 * MIN_BLOCK)
        calls = []
        for _ in range(5):  # prefix and load say the first engine; it has room for three
            calls.append(Client(g, TEXT, {"prompt": prompt, "max_tokens": 2}))
            await until(lambda: sum(len(c.requests) for c in g.clients) == len(calls))
        assert [len(client.requests) for client in g.clients] == [3, 2]
        both = await g.post(TEXT, {"prompt": prompt, "max_tokens": 2, "n": 2})
        assert (both.status_code, both.json()["error"]["code"]) == (503, "overloaded")
        calls.append(Client(g, TEXT, {"prompt": prompt, "max_tokens": 2}))
        await until(lambda: len(g.clients[1].requests) == 3)
        refused = await g.post(TEXT, {"prompt": prompt, "max_tokens": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert g.pool.metrics.rejections == {"full": 2}
        for client in g.clients:
            client.paused = False
        await asyncio.gather(*(call.task for call in calls))
        assert all(call.status == 200 for call in calls)


async def test_a_request_for_several_prompts_is_taken_whole_or_not_at_all():
    config = {"max_num_seqs": 1, "max_queue_len": 2, "max_num_batched_tokens": 8}
    async with gateway(engines=2, config=config) as g:
        # Three pairs fit by number, but no engine has room for two pairs.
        body = {"prompt": [ids(seed, 9) for seed in range(3)], "n": 2, "max_tokens": 2}
        refused = await g.post(TEXT, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert all(client.load.num_requests == 0 for client in g.clients)


async def test_the_death_of_one_engine_fails_its_requests_and_spares_the_others():
    async with gateway(engines=3) as g:
        for client in g.clients:
            client.paused = True
        calls = [Client(g, TEXT, {**BODY, "stream": i % 2 == 0}) for i in range(9)]
        await until(lambda: sum(len(c.requests) for c in g.clients) == 9)
        lost = {r.mailbox.task for r in g.clients[1]._open.values()}
        g.clients[1].die()
        await asyncio.wait_for(asyncio.gather(*lost), 2)
        assert [call.task in lost for call in calls].count(True) == 3
        for call in calls:
            if call.task in lost:
                assert call.status == 503
                assert json.loads(call.body)["error"]["code"] == "engine_dead"
            else:
                assert not call.task.done()
        assert g.pool.dead.is_set()
        assert not g.pool.all_dead
        ready = await g.http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "dead")
        late = await g.post(TEXT, BODY)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_dead")
        for client in (g.clients[0], g.clients[2]):
            client.paused = False
        await asyncio.gather(*(call.task for call in calls))
        assert [call.status for call in calls].count(200) == 6
        for call in calls:
            if call.status == 200 and "data: " in call.body:
                assert parse_events(call.body)[-1]["choices"][0]["finish_reason"] == "length"


async def test_ready_when_all_are_and_the_slowest_shows():
    async with gateway(engines=3) as g:
        kept = [client.ready for client in g.clients]
        g.pool._ready = None
        for client in g.clients[1:]:
            client.ready = None
        g.clients[1]._up(m.Loading(0.75, "warming up"))
        g.clients[2]._up(m.Loading(0.25, "loading weights"))
        shown = await g.http.get("/ready")
        assert shown.json() == {"status": "loading", "progress": 0.25, "doing": "loading weights"}
        refused = await g.post(TEXT, BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        g.clients[2].ready = kept[2]
        assert (await g.http.get("/ready")).json()["progress"] == 0.75
        g.clients[1].ready = kept[1]
        assert (await g.http.get("/ready")).status_code == 200


async def test_what_is_served_is_what_every_engine_can():
    async with gateway(engines=2) as g:
        g.pool._ready = None
        g.clients[1]._up(m.Ready(MAX_MODEL_LEN - 96, VOCAB_SIZE, 500, PAGE_SIZE))
        models = (await g.http.get("/v1/models")).json()
        assert models["data"][0]["max_model_len"] == MAX_MODEL_LEN - 96
        prompt = ids(1, MAX_MODEL_LEN - 96)
        refused = await g.post(TEXT, {"prompt": prompt, "max_tokens": 1})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert (await g.post(TEXT, {"prompt": prompt[1:], "max_tokens": 1})).status_code == 200


async def test_one_engine_that_stands_still_ends_readiness():
    async with gateway(engines=2, watchdog_timeout_s=0.5) as g:
        while (await g.http.get("/ready")).status_code == 200:
            g.clients[0]._up(m.Heartbeat(0, False))
            g.clients[1]._up(m.Heartbeat(7, True))  # alive, but no step is ever done
            await asyncio.sleep(0.02)
        refused = await g.post(TEXT, BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_hung")
        for number in range(8, 30):
            g.clients[0]._up(m.Heartbeat(0, False))
            g.clients[1]._up(m.Heartbeat(number, True))
            await asyncio.sleep(0.02)
        assert (await g.http.get("/ready")).status_code == 200


async def test_metrics_of_each_engine_and_their_totals():
    async with gateway(engines=3) as g:
        prompt = ids(1, 2 * MIN_BLOCK)
        for length in (2 * MIN_BLOCK, 2 * MIN_BLOCK, 20, 20):
            reply = await g.post(TEXT, {"prompt": prompt[:length], "max_tokens": 5})
            assert reply.status_code == 200
        g.clients[2]._up(m.StatsMessage(m.EngineStats(num_running=7, num_waiting=2)))
        found = series((await g.http.get("/metrics")).text)

        def by_engine(name: str, labels: str = "") -> list[float]:
            return [
                found.get(f'{name}{{engine="{i}"{labels},model_name="null"}}', 0) for i in range(3)
            ]

        assert by_engine("vllm:generation_tokens_total") == [10, 5, 5]
        assert by_engine("vllm:prompt_tokens_total") == [4 * MIN_BLOCK, 20, 20]
        assert by_engine("tokenspeed:routing_requests_total") == [2, 1, 1]
        assert by_engine("tokenspeed:routing_matched_tokens_total") == [2 * MIN_BLOCK, 0, 0]
        assert by_engine("tokenspeed:routing_overridden_total") == [0, 0, 0]
        assert by_engine("vllm:num_requests_running")[2] == 7
        assert by_engine("vllm:time_to_first_token_seconds_count") == [2, 1, 1]
        assert by_engine("vllm:request_params_n_sum") == [2, 1, 1]
        ended = by_engine("vllm:request_success_total", ',finished_reason="length"')
        assert ended == [2, 1, 1]
        infinite = by_engine("vllm:inter_token_latency_seconds_bucket", ',le="+Inf"')
        assert infinite == [8, 4, 4]


async def test_flushing_reaches_every_engine_and_ends_what_is_remembered():
    async with gateway(engines=2) as g:
        prompt = ids(1, 2 * MIN_BLOCK)
        for _ in range(2):
            await g.post(TEXT, {"prompt": prompt, "max_tokens": 1})
        assert (await g.post("/flush_cache")).status_code == 200
        for client in g.clients:
            assert [s for s in client.sent if isinstance(s, m.FlushCache)]
        before = g.client.metrics.routing["matched_tokens"]
        assert before == 2 * MIN_BLOCK
        await g.post(TEXT, {"prompt": prompt, "max_tokens": 1})
        assert sum(c.metrics.routing["matched_tokens"] for c in g.clients) == before


async def test_keys_do_not_share_prefixes():
    async with gateway(engines=2, keys=("one", "two")) as g:
        prompt = ids(1, 4 * MIN_BLOCK)
        for key in ("one", "two", "one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            await g.post(TEXT, {"prompt": prompt, "max_tokens": 1}, headers=headers)
        salts = [{request.salt for request in client.requests} for client in g.clients]
        assert [len(found) for found in salts] == [1, 1]
        assert salts[0] != salts[1]


@pytest.mark.parametrize("engines", [2, 3])
async def test_disconnects_at_random_phases_leave_nothing_on_any_engine(engines):
    random.seed(engines)
    async with gateway(engines=engines) as g:
        calls = []
        for i in range(150):
            body = {**BODY, "stream": i % 2 == 0, "n": 1 + i % 3, "max_tokens": 40}
            calls.append(Client(g, TEXT, body))
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            random.choice(calls).leave()
        for call in calls:
            call.leave()
        await asyncio.gather(*(call.task for call in calls))
        await until(lambda: not any(c.echo.running or c.echo.waiting for c in g.clients))
        assert all(len(client.requests) > 10 for client in g.clients)
