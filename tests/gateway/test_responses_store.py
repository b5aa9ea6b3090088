# SPDX-License-Identifier: MIT
"""The store of responses against a plain model of it: bounds, chains, tenants, references."""

import random
import secrets

import pytest

from tests.gateway.harness import gateway
from tests.gateway.response_events import check_list, check_response
from tests.gateway.scripted import Scripted
from tests.gateway.test_responses import ADD, HERMES, PATH, TEMPLATE, call
from tokenspeed.errors import RequestError
from tokenspeed.gateway.responses_store import Kept, ResponseStore, keep, unpack


def kept(name, *, tenant="t", parent=None, size=0) -> Kept:
    output = [{"id": f"out_{name}", "text": secrets.token_hex(size)}]
    given = [{"id": f"in_{name}"}]
    return keep(tenant, {"id": name, "output": output}, given, parent)


def test_the_least_used_goes_first():
    store = ResponseStore(max_count=3)
    for name in "abc":
        store.put(kept(name))
    assert store.get("t", "a") is not None
    store.put(kept("d"))
    assert [name for name in "abcd" if store.get("t", name)] == ["a", "c", "d"]


def test_bytes_are_counted_and_bounded():
    store = ResponseStore(max_bytes=4000)
    for i in range(50):
        made = kept(str(i), size=random.Random(i).randrange(1000))
        store.put(made)
        found = [one for j in range(i + 1) if (one := store.get("t", str(j)))]
        assert store.num_bytes == sum(one.size for one in found) <= 4000
        assert store.find_item("t", f"out_{i}") is not None
    store.put(kept("huge", size=5000))
    assert store.get("t", "huge") is None
    assert store.num_bytes == 0


def test_what_one_request_brings_back_is_bounded(monkeypatch):
    monkeypatch.setattr("tokenspeed.gateway.responses_store.MAX_PLAIN", 5000)
    store, parent = ResponseStore(), None
    for name in "abc":
        parent = kept(name, parent=parent, size=1000)
        store.put(parent)
    find = store.finder("t")
    assert [
        find(i)["id"] for i in ("in_a", "out_a", "in_b", "out_b")
    ] == "in_a out_a in_b out_b".split()
    assert find("in_d") is None
    with pytest.raises(RequestError, match="at most 5000 bytes"):
        find("in_c")
    with pytest.raises(RequestError, match="previous_response_id"):
        parent.all_items()


def test_a_chain_keeps_its_beginning():
    store = ResponseStore(max_count=4)
    parent = None
    for name in "abc":
        parent = kept(name, parent=parent)
        store.put(parent)
    for i in range(20):
        store.put(kept(f"other{i}"))
        found = store.get("t", "c")
        assert found is not None
        ids = [item["id"] for item in found.all_items()]
        assert ids == ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
    store.put(kept("x"))
    store.put(kept("y"))
    assert store.get("t", "c") is None  # the child goes before those that it needs
    assert store.get("t", "a") is not None


def test_what_a_child_needs_outlives_its_deletion():
    store = ResponseStore()
    first = kept("a")
    second = kept("b", parent=first)
    store.put(first)
    store.put(second)
    store.delete(first)
    assert store.get("t", "a") is None
    assert store.find_item("t", "out_a") is None
    assert store.get("t", "b").all_items()[0]["id"] == "in_a"
    store.delete(second)
    assert store.get("t", "b") is None
    assert store.num_bytes == first.size


def test_tenants_see_nothing_of_each_other():
    store = ResponseStore(max_count=2)
    store.put(kept("a", tenant="one"))
    for i in range(5):
        store.put(kept(str(i), tenant="two"))
    assert store.get("two", "a") is None
    assert store.find_item("two", "out_a") is None
    assert store.get("one", "a") is not None


def test_against_a_model():
    rng, store, order = random.Random(5), ResponseStore(max_count=8), []
    for i in range(2000):
        if rng.random() < 0.5:
            store.put(kept(str(i)))
            order = [*order, str(i)][-8:]
        elif order:
            name = rng.choice([*order, "none"])
            found = store.get("t", name)
            assert (found is not None) == (name in order)
            if found is not None and rng.random() < 0.3:
                store.delete(found)
                order.remove(name)
            elif found is not None:
                order = [one for one in order if one != name] + [name]
    assert unpack(store.get("t", order[0]).response).startswith(b'{"id"')


KEYS = ("first-key", "second-key")
FIRST, SECOND = ({"authorization": f"Bearer {key}"} for key in KEYS)


async def create(g, **body):
    reply = await g.post(PATH, {"input": "hi"} | body, headers=FIRST)
    assert reply.status_code == 200, reply.text
    return check_response(reply.json())


def served(*answers):
    return gateway(echo=Scripted(*answers), template=TEMPLATE, config=HERMES, keys=KEYS)


async def test_get_delete_and_another_tenant():
    async with served("héllo") as g:
        made = await create(g)
        url = f"{PATH}/{made['id']}"
        for method, path in (("GET", url), ("DELETE", url), ("POST", f"{url}/cancel")):
            other = await g.http.request(method, path, headers=SECOND)
            assert other.status_code == 404
            assert other.json()["error"]["code"] == "response_not_found"
        assert (await g.http.get(f"{url}/input_items", headers=SECOND)).status_code == 404
        stolen = {"input": "x", "previous_response_id": made["id"]}
        reply = await g.post(PATH, stolen, headers=SECOND)
        assert (reply.status_code, reply.json()["error"]["code"]) == (
            404,
            "previous_response_not_found",
        )
        reference = {"input": [{"type": "item_reference", "id": made["output"][0]["id"]}]}
        reply = await g.post(PATH, reference, headers=SECOND)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "item_not_found")
        assert (await g.http.get(url, headers=FIRST)).json() == made
        replay = await g.http.get(f"{url}?stream=true", headers=FIRST)
        assert (replay.status_code, replay.json()["error"]["param"]) == (400, "stream")
        stopped = await g.post(f"{url}/cancel", headers=FIRST)
        assert stopped.json()["error"]["code"] == "not_cancellable"
        gone = await g.http.delete(url, headers=FIRST)
        assert gone.json() == {"id": made["id"], "object": "response", "deleted": True}
        assert (await g.http.get(url, headers=FIRST)).status_code == 404


async def test_nothing_is_kept_of_what_is_not_to_be_stored():
    async with served("x") as g:
        made = await create(g, store=False)
        assert made["store"] is False
        assert (await g.http.get(f"{PATH}/{made['id']}", headers=FIRST)).status_code == 404
        assert g.service.responses.num_bytes == 0


async def test_a_conversation_goes_on():
    answers = f"<think>t</think>I add.{call('add', a=1)}", "Two.", "Yes."
    async with served(*answers) as g:
        first = await create(g, instructions="Be brief.", tools=[ADD])
        output = {"type": "function_call_output", "call_id": first["output"][2]["call_id"]}
        stored = await create(
            g, previous_response_id=first["id"], input=[output | {"output": "2"}], tools=[ADD]
        )
        items = [{"type": "message", "role": "user", "content": "hi"}, *first["output"]]
        items += [output | {"output": "2"}]
        await create(g, input=items, tools=[ADD], store=False)
        stateless, with_id = g.echo.prompts[2], g.echo.prompts[1]
        assert with_id == stateless
        deeper = await create(g, previous_response_id=stored["id"], input="Sure?")
        assert deeper["previous_response_id"] == stored["id"]
        text = g.service.tokenizer.decode(g.echo.prompts[3], skip_special_tokens=False)
        assert "Be brief." not in text
        assert "Two.<|user|>/Sure?" in text
        again = [{"type": "item_reference", "id": first["output"][1]["id"]}]
        await create(g, input=[*again, {"role": "user", "content": "?"}])
        text = g.service.tokenizer.decode(g.echo.prompts[4], skip_special_tokens=False)
        assert text == "<|assistant|>/I add.<|user|>/?"


async def test_input_items_are_listed_in_pages():
    items = [{"role": "user", "content": f"message {i}"} for i in range(3)]
    items += [
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "message", "id": "msg_own", "role": "assistant", "content": "end"},
    ]
    async with served("x") as g:
        made = await create(g, input=items)
        url = f"{PATH}/{made['id']}/input_items"

        async def page(query):
            return check_list((await g.http.get(url + query, headers=FIRST)).json())

        every = await page("?order=asc")
        ids = [item["id"] for item in every["data"]]
        assert [item["type"] for item in every["data"][2:]] == [
            "message",
            "function_call",
            "function_call_output",
            "message",
        ]
        assert ids[-1] == every["last_id"] == "msg_own"
        assert [item["id"] for item in (await page(""))["data"]] == ids[::-1]
        seen, query = [], "?order=asc&limit=4"
        while True:
            part = await page(query)
            seen += [item["id"] for item in part["data"]]
            if not part["has_more"]:
                break
            query = f"?order=asc&limit=4&after={part['last_id']}"
        assert seen == ids
        for wrong in ("?limit=0", "?limit=101", "?limit=x", "?order=up", "?after=none"):
            reply = await g.http.get(url + wrong, headers=FIRST)
            assert reply.status_code == 400, wrong
            assert reply.json()["error"]["param"] in wrong


@pytest.mark.parametrize("wanted", ["resp_none", "%00", "a" * 3000])
async def test_ids_that_nobody_has(wanted):
    async with served("x") as g:
        reply = await g.http.get(f"{PATH}/{wanted}", headers=FIRST)
        assert reply.status_code == 404
        assert len(reply.content) < 400
