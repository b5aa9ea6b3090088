# SPDX-License-Identifier: MIT
"""Tenants: the file, roles over the whole route table, limits, and that nothing of one tenant
reaches another."""

import asyncio
import hashlib
import itertools
import json
import os
import signal

import pytest

from tests.gateway.harness import gateway
from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.limits import Limits
from tokenspeed.gateway.serving import _keys, _reload_on_hangup
from tokenspeed.gateway.tenants import ROLES, TenantSpec, read_tenants, tenants_of_keys

TEXT = {"prompt": "hello " * 100, "max_tokens": 4}
METERED = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"}
UNMETERED = {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}


def spec(name, *keys, roles=("inference",), limits=Limits(), group=None):  # noqa: B008
    return TenantSpec(
        name, tuple(hashlib.sha256(k.encode()).digest() for k in keys), roles, limits, group
    )


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def one(**more):
    return {"tenants": [{"name": "web", "keys": ["k"]} | more]}


def test_a_file_says_it_all(tmp_path):
    digest = hashlib.sha256(b"secret").hexdigest()
    entry = {
        "name": "web",
        "keys": [
            "plain",
            f"sha256:{digest}",
            digest.upper()[:0] + hashlib.sha256(b"x").hexdigest(),
        ],
        "roles": ["admin", "inference", "inference"],
        "max_concurrency": 2,
        "requests_per_minute": 3,
        "tokens_per_minute": 4,
        "share_cache": "team",
    }
    other = {"name": "ops", "keys": ["o"], "roles": ["metrics"], "share_cache": True}
    web, ops = read_tenants(write(tmp_path / "t", {"tenants": [entry, other]}))
    digests = tuple(hashlib.sha256(k).digest() for k in (b"plain", b"secret", b"x"))
    assert web == TenantSpec("web", digests, ("inference", "admin"), Limits(2, 3, 4), "team")
    assert (ops.roles, ops.limits, ops.group) == (("metrics",), Limits(), "shared")
    assert read_tenants(write(tmp_path / "t", one()))[0].roles == ("inference",)


HOSTILE = [
    ("", "JSON|truncated"),
    ("[]", "object"),
    ("{", "truncated"),
    ('{"tenants": NaN}', "malformed"),
    ("{}", "missing required field `tenants`"),
    ({"tenants": []}, "empty"),
    ({"tenants": [], "more": 1}, "unknown field `more`"),
    (one(colour="red"), r"unknown field `colour`.*tenants\[0\]|unknown field `colour`.*\[\.\.\.\]"),
    (one(keys="k"), "array"),
    (one(keys=[1]), "str"),
    (one(keys=[]), r"tenants\[0\].keys is empty"),
    (one(keys=["good", " "]), r"tenants\[0\].keys\[1\]"),
    (one(keys=["good", "two\nlines"]), r"tenants\[0\].keys\[1\]"),
    (one(keys=["same", "same"]), "same key"),
    (one(keys=["k", hashlib.sha256(b"k").hexdigest()]), "same key"),
    (one(name=""), r"tenants\[0\].name"),
    (one(name="a b"), r"tenants\[0\].name"),
    (one(name="a" * 65), r"tenants\[0\].name"),
    (one(name="evil\n"), r"tenants\[0\].name"),
    (one(roles=["root"]), "root"),
    (one(roles=[]), r"tenants\[0\].roles"),
    (one(max_concurrency=0), r"tenants\[0\].max_concurrency"),
    (one(requests_per_minute=-1), r"tenants\[0\].requests_per_minute"),
    (one(tokens_per_minute=1.5), "int"),
    (one(share_cache="a b"), r"tenants\[0\].share_cache"),
    (one(share_cache=1), "bool"),
    ({"tenants": [*one()["tenants"], *one(keys=["other"])["tenants"]]}, "two are named 'web'"),
    ({"tenants": [*one()["tenants"], *one(name="b")["tenants"]]}, "same key .* 'web' and 'b'"),
    (one(keys=[f"key-{i}" for i in range(1025)]), "at most 1024 keys"),
    ("[" * 100_000, "recursion|depth|array"),
    ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "malformed|JSON|character"),
    (" " * (2 << 20), "bytes"),
]


@pytest.mark.parametrize(("content", "why"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_wrong_file_is_refused_by_its_entry(tmp_path, content, why):
    with pytest.raises(ValueError, match=why) as caught:
        read_tenants(write(tmp_path / "t.json", content))
    assert str(caught.value).startswith("tenants")
    assert "key-" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        read_tenants(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot read"):
        read_tenants(str(tmp_path))
    with pytest.raises(ValueError, match="two are named 'key1'"):
        Keys(("a",), [spec("key1", "b")])
    with pytest.raises(ValueError, match="same key is given twice, to 'key1' and 'web'"):
        Keys(("a",), [spec("web", "a")])


def test_keys_of_options_are_tenants_with_all_roles():
    first, second = tenants_of_keys(("a", "b"))
    assert (first.name, second.name) == ("key1", "key2")
    assert first.roles == second.roles == ROLES


def everything():
    """A tenant for every set of roles."""
    sets = [c for n in (1, 2, 3) for c in itertools.combinations(ROLES, n)]
    return {roles: "-".join(roles) for roles in sets}


async def test_roles_decide_on_every_route():
    tenants = [spec(key, key, roles=roles) for roles, key in everything().items()]
    async with gateway(tenants=tenants) as g:
        for route, (roles, key) in itertools.product(g.app.table, everything().items()):
            path = route.path.replace("{model:path}", "null").replace("{", "").replace("}", "")
            path += "?count=0" * (path == "/dashboard/events")  # else it has no end
            reply = await g.http.request(route.method, path, headers={"x-api-key": key})
            refused = reply.status_code == 403 and "missing_role" in reply.text
            if route.path.startswith("/v1/messages"):
                refused = reply.status_code == 403 and "permission_error" in reply.text
            allowed = route.open or bool(set(route.roles) & set(roles))
            assert refused == (not allowed), (route.path, roles, reply.text)


async def test_what_routes_need():
    """Said once more by hand, so that no route gets a role by accident."""
    async with gateway() as g:
        table = g.app.table
    for route in table:
        if route.path in ("/health", "/ready", "/dashboard", "/dashboard/files/{file}"):
            assert route.open
        elif route.path == "/metrics":
            assert route.roles == ("metrics",)
        elif route.admin:
            assert route.roles == ("admin",)
        elif route.path in ("/version", "/openapi.json"):
            assert route.roles == ROLES
        elif route.path.startswith("/v1/sessions"):
            assert route.roles == ("inference", "admin")
        else:
            assert route.roles == ("inference",)
        posts = route.method == "POST" and route.roles == ("inference",)
        if posts and "{" not in route.path:
            assert route.path in METERED | UNMETERED
        assert route.metered == (route.method == "POST" and route.path in METERED)


async def test_rates_in_each_dialects_words():
    limits = Limits(requests_per_minute=1)
    async with gateway(tenants=[spec("a", "ka", limits=limits), spec("b", "kb")]) as g:

        async def ask(key):
            return await g.post("/v1/completions", TEXT, headers={"x-api-key": key})

        assert (await ask("ka")).status_code == 200
        reply = await ask("ka")
        assert reply.status_code == 429
        assert 55 <= int(reply.headers["retry-after"]) <= 60
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        reply = await g.post("/v1/messages", {}, headers={"x-api-key": "ka"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        for _ in range(5):  # another tenant does not notice, and free routes stay free
            assert (await ask("kb")).status_code == 200
            reply = await g.http.get("/v1/models", headers={"x-api-key": "ka"})
            assert reply.status_code == 200


async def test_uncached_and_output_tokens_are_charged():
    limits = Limits(tokens_per_minute=1000)
    async with gateway(tenants=[spec("a", "ka", limits=limits)]) as g:
        bucket = g.service.keys.tenant([(b"x-api-key", b"ka")]).limiter._tokens
        levels = [bucket._level]
        for _ in range(2):
            usage = (await g.post("/v1/completions", TEXT, headers={"x-api-key": "ka"})).json()[
                "usage"
            ]
            await asyncio.sleep(0)
            levels.append(bucket._level)
        prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        assert cached > 0
        assert levels[0] - levels[1] == pytest.approx(prompt + 4, abs=10)
        assert levels[1] - levels[2] == pytest.approx(prompt - cached + 4, abs=10)


async def test_concurrency_queues_within_a_tenant_only():
    tenants = [spec("a", "ka", limits=Limits(max_concurrency=1)), spec("b", "kb")]
    async with gateway(tenants=tenants) as g:
        g.client.paused = True

        async def ask(key):
            return await g.post("/v1/completions", TEXT, headers={"x-api-key": key})

        tasks = [asyncio.create_task(ask(key)) for key in ("ka", "ka", "ka", "kb")]
        while len(g.client.requests) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert len({r.salt for r in g.client.requests}) == len(g.client.requests) == 2
        g.client.paused = False
        assert [reply.status_code for reply in await asyncio.gather(*tasks)] == [200] * 4


async def test_salts_are_shared_on_purpose_only():
    tenants = [
        spec("a", "ka"),
        spec("b", "kb"),
        spec("team", "kt"),
        spec("c", "kc", group="team"),
        spec("d", "kd", group="team"),
        spec("e", "ke", group="a"),
    ]
    async with gateway(keys=("k",), tenants=tenants) as g:
        salts = {}
        for key in ("ka", "kb", "kt", "kc", "kd", "ke", "k"):
            await g.post("/v1/completions", TEXT, headers={"x-api-key": key})
            salts[key] = g.client.requests[-1].salt
        assert salts["kc"] == salts["kd"]
        assert len(set(salts.values())) == 6
        users = {request.user for request in g.client.requests}
        assert len(users) == 7  # a cache in common is no share in common
        assert all(len(user) == 16 and user not in "abcde" for user in users)


async def test_two_tenants_with_the_same_prompts_share_nothing():
    async with gateway(tenants=[spec("a", "ka"), spec("b", "kb")]) as g:
        for i in range(20):
            body = {"messages": [{"role": "user", "content": f"same {i} " * 50}], "max_tokens": 1}
            for key in ("ka", "kb"):
                reply = await g.post("/v1/chat/completions", body, headers={"x-api-key": key})
                assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        pairs = [(g.client.requests[i], g.client.requests[i + 1]) for i in range(0, 40, 2)]
        assert all(a.prompt_ids == b.prompt_ids for a, b in pairs)
        assert all(a.salt != b.salt and a.user != b.user for a, b in pairs)


async def test_metrics_and_errors_name_no_tenant():
    tenants = [spec("tenant-one", "ka", roles=ROLES), spec("tenant-two", "kb")]
    async with gateway(tenants=tenants) as g:
        for key in ("ka", "kb"):
            await g.post("/v1/completions", TEXT | {"user": "u"}, headers={"x-api-key": key})
        text = (await g.http.get("/metrics", headers={"x-api-key": "ka"})).text
        assert "tenant-" not in text
        wrong = await g.http.get("/v1/models", headers={"x-api-key": "kc"})
        none = await g.http.get("/v1/models")
        assert wrong.content == none.content
        assert "tenant-" not in wrong.text
        refused = await g.http.get("/metrics", headers={"x-api-key": "kb"})
        assert refused.status_code == 403
        assert "tenant-" not in refused.text


async def test_a_response_is_its_tenants_even_with_a_shared_cache():
    tenants = [spec("a", "ka", group="team"), spec("b", "kb", group="team")]
    async with gateway(tenants=tenants) as g:
        made = await g.post(
            "/v1/responses", {"input": "hello", "max_output_tokens": 3}, headers={"x-api-key": "ka"}
        )
        path = f"/v1/responses/{made.json()['id']}"
        own = await g.http.get(path, headers={"x-api-key": "ka"})
        other = await g.http.get(path, headers={"x-api-key": "kb"})
        missing = await g.http.get(f"{path}0", headers={"x-api-key": "kb"})
        assert (own.status_code, other.status_code, missing.status_code) == (200, 404, 404)


def test_every_key_is_compared(monkeypatch):
    """Whether a key is the first, the last or none: the same comparisons."""
    keys = Keys(tuple("abc"), [spec(f"t{i}", f"k{i}") for i in range(50)])
    compare, counts = __import__("hmac").compare_digest, []

    def counting(a, b):
        counts[-1] += 1
        return compare(a, b)

    monkeypatch.setattr("tokenspeed.gateway.auth.hmac.compare_digest", counting)
    for key, name in ((b"a", "key1"), (b"k49", "t49"), (b"k1", "t1")):
        counts.append(0)
        assert keys.tenant([(b"x-api-key", key)]).name == name
    for key in (b"", b"zzz", b"\xff" * 1000):
        counts.append(0)
        with pytest.raises(Exception, match="a valid API key"):
            keys.tenant([(b"x-api-key", key)])
    assert set(counts) == {53}


def test_others_from_now_on():
    keys = Keys(("k",), [spec("a", "ka"), spec("b", "kb")])
    before = keys.tenant([(b"x-api-key", b"ka")])
    with pytest.raises(ValueError, match="two are named"):
        keys.replace([spec("a", "x"), spec("a", "y")])
    assert keys.tenant([(b"x-api-key", b"kb")]).name == "b"
    keys.replace([spec("a", "new", limits=Limits(max_concurrency=1))])
    after = keys.tenant([(b"x-api-key", b"new")])
    assert (after.salt, after.limiter) == (before.salt, before.limiter)
    assert before.limiter.limits.max_concurrency == 1
    assert keys.tenant([(b"x-api-key", b"k")]).name == "key1"
    for gone in (b"ka", b"kb"):
        with pytest.raises(Exception, match="a valid API key"):
            keys.tenant([(b"x-api-key", gone)])


async def test_hangup_reads_the_file_again(tmp_path, caplog):
    path = tmp_path / "tenants.json"
    options = ServerOptions(tenants=write(path, one()))
    config = EngineConfig()
    keys = _keys(config, options)
    _reload_on_hangup(config, options, keys)
    try:

        async def hang_up():
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)

        write(path, one(keys=["other"], roles=["admin"]))
        await hang_up()
        assert keys.tenant([(b"x-api-key", b"other")]).roles == ("admin",)
        write(path, one(roles=["root"]))
        await hang_up()
        assert keys.tenant([(b"x-api-key", b"other")]).name == "web"
        assert "the tenants stay as they were: tenants: " in caplog.text
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


async def test_a_receipt_knows_nothing_of_another_tenants_session():
    """Not even where two tenants share a cache and call their sessions the same."""
    tenants = [spec("a", "ka", group="team"), spec("b", "kb", group="team")]
    async with gateway(tenants=tenants) as g:

        async def receipt(key, text):
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "max_tokens": 3, "cache_receipt": True}
            headers = {"x-api-key": key, "session-id": "same"}
            reply = await g.post("/v1/chat/completions", body, headers=headers)
            return reply.json()["usage"]["cache_receipt"]

        await receipt("ka", "the secret of a")
        other = await receipt("kb", "the secret of b")
        assert (other["expected"], other["first_divergent_token"]) == (0, None)
        own = await receipt("ka", "the secret of c")
        assert own["expected"] > 0
        assert own["first_divergent_token"] is not None
