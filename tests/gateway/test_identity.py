# SPDX-License-Identifier: MIT
"""Who asks: sessions, users and owners out of headers and bodies, as agents send them and as nobody
should."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.harness import gateway
from tokenspeed.engine.messages import Retention
from tokenspeed.errors import RequestError
from tokenspeed.gateway.auth import Keys
from tokenspeed.gateway.identity import (
    MAX_PARENTS,
    MAX_SESSION,
    Hints,
    Owners,
    caller_of,
    retention_of,
)
from tokenspeed.gateway.tenants import Tenant

PSEUDONYM = Keys().pseudonym
TEXT = {"prompt": "hello", "max_tokens": 1}


def caller(headers=None, tenant=None, owners=None, **hints):
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    who = tenant or Tenant("t")
    return caller_of(pairs, who, Hints(**hints), owners or Owners(), PSEUDONYM)


ALL = {
    "X-Claude-Code-Session-Id": "claude",
    "session-id": "codex",
    "session_id": "codex2",
    "X-Session-Id": "x",
    "X-Session-Affinity": "affinity",
    "x-opencode-session": "opencode",
}
METADATA = {"user_id": "user_1_account_2_session_meta"}
BODY = {"prompt_cache_key": "key", "conversation": {"id": "conv"}}


def test_sessions_in_the_order_in_which_they_are_trusted():
    headers, hints = dict(ALL), {"metadata": METADATA} | BODY
    found = []
    for name in ALL:
        found.append(caller(headers, **hints).session)
        del headers[name]
        if name == "X-Claude-Code-Session-Id":
            found.append(caller(headers, **hints).session)
            del hints["metadata"]
    for name in BODY:
        found.append(caller(**hints).session)
        del hints[name]
    names = ["claude", "meta", "codex", "codex2", "x", "affinity", "opencode", "key", "conv"]
    assert found == names
    assert caller().session is None
    assert caller({"x-client-request-id": "abc", "x-request-id": "abc"}).session is None


def test_both_shapes_of_anthropics_user_id():
    text = caller(metadata={"user_id": "user_ab_account_cd_session_ef-01"})
    parts = {"device_id": "dev", "account_uuid": "acc", "session_id": "ef-01"}
    shaped = caller(metadata={"user_id": json.dumps(parts)})
    assert text.session == shaped.session == "ef-01"
    assert shaped.user == caller(user="acc").user
    assert text.user == caller(user="user_ab_account_cd").user
    no_account = caller(metadata={"user_id": json.dumps(parts | {"account_uuid": ""})})
    assert no_account.user == caller(user="dev").user
    assert caller(metadata={"user_id": "just-a-user"}).user == caller(user="just-a-user").user
    assert caller(metadata={"user_id": "just-a-user"}).session is None


def test_users():
    assert caller(user="u", safety_identifier="s").user == caller(user="u").user
    assert caller(safety_identifier="u").user == caller(user="u").user
    assert caller(user="u", tenant=Tenant("other")).user != caller(user="u").user
    assert caller().user != caller(user="u").user
    assert caller(tenant=Tenant()).user == ""  # no keys, no names: everybody is one
    assert len(caller(user="u" * 10**6).user) == 16
    a, b = caller({"session-id": "a"}), caller({"session-id": "b"})
    assert a.user != b.user
    assert a.user == caller({"session-id": "a"}).user


def test_subagents_of_claude_code_are_their_owners():
    main = {"x-claude-code-session-id": "s"}
    first, second = (
        main | {"x-claude-code-agent-id": i, "x-claude-code-parent-agent-id": "p"} for i in "12"
    )
    owners = Owners()
    found = [caller(h, owners=owners) for h in (main, first, second)]
    assert len({one.user for one in found}) == 1
    assert [one.session for one in found] == ["s", "s:1", "s:2"]


@pytest.mark.parametrize("header", ["x-parent-session-id", "x-codex-parent-thread-id"])
def test_subagents_of_subagents_are_the_roots(header):
    owners = Owners()
    root = caller({"session-id": "root"}, owners=owners)
    child = caller({"session-id": "child", header: "root"}, owners=owners)
    grandchild = caller({"session-id": "grandchild", header: "child"}, owners=owners)
    again = caller({"session-id": "grandchild"}, owners=owners)
    assert {root.user, child.user, grandchild.user, again.user} == {root.user}
    stranger = caller({"session-id": "grandchild"}, Tenant("other"), owners)
    assert stranger.user == caller({"session-id": "grandchild"}, Tenant("other")).user
    assert caller({header: "root"}, owners=owners).user == root.user


def test_parents_that_go_round_end():
    owners = Owners()
    for _ in range(3):
        for child, parent in (("a", "b"), ("b", "c"), ("c", "a"), ("a", "a")):
            caller({"session-id": child, "x-parent-session-id": parent}, owners=owners)
    for i in range(MAX_PARENTS + 10):
        owners.root("t", f"child{i}", "root")
    assert len(owners._roots["t"]) == MAX_PARENTS
    assert owners.root("t", "child0", None) == "child0"
    assert owners.root("t", f"child{MAX_PARENTS}", None) == "root"


@pytest.mark.parametrize(
    "name", ["a" * (MAX_SESSION + 1), "a b", "ä", "a\x00", 'x"y', "a=b", "a/b"]
)
def test_names_that_are_not_plain_are_hashed(name):
    found = caller(prompt_cache_key=name).session
    assert found.startswith("h:")
    assert len(found) == 34
    assert found == caller(prompt_cache_key=name).session
    assert found != caller(prompt_cache_key=name[:-1] + "~").session


@pytest.mark.parametrize("value", [None, 1, 1.5, True, [], ["a"], {}, {"id": 3}, "", "  "])
def test_what_is_no_name_is_nothing(value):
    found = caller(user=value, safety_identifier=value, metadata=value, conversation=value)
    assert found.session is None
    assert caller(metadata={"user_id": value}).session is None


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300)
json_values = st.recursive(
    junk, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [h.lower().encode() for h in (*ALL, "user-agent", "x-parent-session-id")]
            ),
            st.binary(max_size=200),
        )
    ),
    json_values | st.fixed_dictionaries({"user_id": st.text(max_size=200)}),
    json_values,
)
def test_whatever_comes_is_bounded(headers, metadata, value):
    hints = Hints(value, value, metadata, value, value)
    found = caller_of(headers, Tenant("t"), hints, Owners(), PSEUDONYM)
    assert len(found.user) == 16
    assert found.session is None or 0 < len(found.session) <= MAX_SESSION
    assert found.session is None or (found.session.isascii() and " " not in found.session)
    assert len(found.client) <= 32


def test_user_agents():
    agents = {
        "codex_cli_rs/0.169.0 (Linux; x86_64) xterm": "codex_cli_rs",
        "claude-cli/2.1.0 (external, cli)": "claude-cli",
        "OpenAI/Python 1.60": "OpenAI",
        "": "",
        "(weird)": "",
        "a" * 100: "a" * 32,
    }
    assert {agent: caller({"user-agent": agent}).client for agent in agents} == agents


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("90s", Retention(90.0)),
        ("30m", Retention(1800.0)),
        (" 1H ", Retention(3600.0)),
        ("24h", Retention(86400.0)),
        ("pin", Retention(pinned=True)),
    ],
)
def test_retention(text, wanted):
    assert retention_of(text.encode()) == wanted


@pytest.mark.parametrize(
    "text", ["", "0s", "25h", "1d", "-1m", "1.5h", "m", "9" * 50 + "s", "inf", "pin pin", "١m"]
)
def test_a_retention_that_says_nothing(text):
    with pytest.raises(RequestError, match=r"^x-tokenspeed-retention: "):
        retention_of(text.encode())


async def test_what_the_engine_is_told():
    async with gateway(keys=("k",)) as g:
        headers = {"x-api-key": "k", "x-tokenspeed-retention": "30m", "session-id": "s"}
        await g.post("/v1/completions", TEXT | {"user": "Ann"}, headers=headers)
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "user": "Ann"}
        await g.post("/v1/chat/completions", chat, headers=headers)
        metadata = {"metadata": {"user_id": "Ann"}, "messages": chat["messages"], "max_tokens": 1}
        await g.post("/v1/messages", metadata | {"model": "null"}, headers=headers)
        body = {"input": "hi", "max_output_tokens": 1, "user": "Ann"}
        await g.post("/v1/responses", body, headers=headers)
        assert len(g.client.requests) == 4
        assert {r.retention for r in g.client.requests} == {Retention(1800.0)}
        (user,) = {r.user for r in g.client.requests}
        assert len(user) == 16
        reply = await g.post(
            "/v1/completions", TEXT, headers=headers | {"x-tokenspeed-retention": "x"}
        )
        assert (reply.status_code, reply.json()["error"]["param"]) == (
            400,
            "x-tokenspeed-retention",
        )
