# SPDX-License-Identifier: MIT
"""Made-up agents: seeded, layered, in bounds, shared as told, and shaped like recorded ones."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenspeed.bench.cache_bound import hit_rate
from tokenspeed.bench.session import Session, Workload, shared_blocks
from tokenspeed.bench.timeline import turn_times
from tokenspeed.bench.workloads import generated, mooncake, weka
from tokenspeed.bench.workloads.chains import Texts
from tokenspeed.bench.workloads.habits import CLIENTS, FITTED, LOCAL_TOOLS, MEASURED
from tokenspeed.bench.workloads.sampling import Counts, LogNormal, Mixture, Quantiles

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "workload_statistics.py"


# Sessions of at most some thirty requests: the tests look at structure.
SHORT = replace(FITTED, messages=Quantiles((0, 1), (1, 5)), requests=Quantiles((0, 1), (5, 30)))


@pytest.fixture(scope="module")
def made() -> Workload:
    return generated.make(sessions=60, seed=3, span_s=3600.0, subagents=0.5, habits=SHORT)


def mains(workload: Workload) -> list[Session]:
    return [session for session in workload.sessions if session.parent is None]


def test_the_seed_decides_everything() -> None:
    def one(seed: int) -> Workload:
        return generated.make(sessions=4, seed=seed, span_s=100.0, habits=SHORT)

    assert one(1) == one(1)
    first, second = mains(one(1)), mains(one(2))
    assert [s.turns[0].input_tokens for s in first] != [s.turns[0].input_tokens for s in second]
    assert [s.start_s for s in first] != [s.start_s for s in second]


def test_every_turn_is_whole(made: Workload) -> None:
    assert len({s.session_id for s in made.sessions}) == len(made.sessions)
    assert len(mains(made)) == 60
    assert [s.start_s for s in made.sessions] == sorted(s.start_s for s in made.sessions)
    for session in made.sessions:
        for turn in session.turns:
            assert turn.input_tokens == len(turn.prompt_blocks) * 64 + turn.tail_tokens
            assert 0 <= turn.tail_tokens < 64
            assert 1 <= turn.output_tokens <= 18_000
            assert turn.gap_s >= 0
            assert turn.cancel_after is None or 1 <= turn.cancel_after <= turn.output_tokens
            assert len(set(turn.prompt_blocks)) == len(turn.prompt_blocks)


def test_a_scale_divides_inputs_and_outputs_alike() -> None:
    whole = generated.make(sessions=12, seed=5, habits=SHORT)
    small = generated.make(sessions=12, seed=5, habits=SHORT, scale=16)
    assert small.num_turns == whole.num_turns
    assert whole.input_tokens / small.input_tokens == pytest.approx(16, rel=0.01)
    assert whole.output_tokens / small.output_tokens == pytest.approx(16, rel=0.02)
    assert hit_rate(small) == pytest.approx(hit_rate(whole), abs=0.002)


def test_sessions_of_one_client_share_its_layers(made: Workload) -> None:
    versions: dict[int, list[Session]] = {}
    for session in mains(made):
        versions.setdefault(session.turns[0].prompt_blocks[0], []).append(session)
    assert 5 < len(versions) <= len(CLIENTS["claude"].system)
    heads = {tools + system for tools, system in zip(
        CLIENTS["claude"].tools, CLIENTS["claude"].system, strict=True
    )}  # fmt: skip
    for same in versions.values():
        for a, b in pairwise(same):
            shared = shared_blocks(a.turns[0].prompt_blocks, b.turns[0].prompt_blocks)
            # Tools and system prompt at least, the repository's rules at most.
            assert min(heads) // 64 <= shared <= (max(heads) + 4000) // 64
    first, second = (same[0].turns[0].prompt_blocks for same in list(versions.values())[:2])
    assert not set(first) & set(second)


def test_history_is_kept_but_for_the_events() -> None:
    quiet = replace(
        SHORT, compaction=0, rerender=0, tools_change=0, window=Quantiles((0, 1), (1e7, 1e7))
    )
    for session in mains(generated.make(sessions=10, habits=quiet, subagents=0)):
        for before, turn in pairwise(session.turns):
            kept = shared_blocks(before.prompt_blocks, turn.prompt_blocks)
            assert kept == len(before.prompt_blocks)


@pytest.mark.parametrize(
    ("event", "kept"), [("compaction", True), ("rerender", True), ("tools_change", False)]
)
def test_an_event_keeps_the_layers_it_should(event: str, kept: bool) -> None:
    short = {"messages": Quantiles((0, 1), (1, 4)), "requests": Quantiles((0, 1), (8, 9))}
    endless = {"window": Quantiles((0, 1), (1e7, 1e7)), "large_window": 10**7}
    always = {"compaction": 0.0, "rerender": 0.0, "tools_change": 0.0, "retry": 0.0} | {event: 1.0}
    habits = replace(FITTED, **always, **short, **endless)  # type: ignore[arg-type]
    sizes = set()
    for session in mains(generated.make(sessions=8, habits=habits, subagents=0)):
        for before, turn in pairwise(session.turns):
            shared = shared_blocks(before.prompt_blocks, turn.prompt_blocks) * 64
            assert (8000 < shared < 26_000) if kept else shared == 0
            sizes.add(turn.input_tokens > before.input_tokens)
            if event == "compaction":
                assert turn.input_tokens < 26_000 + 10_000 + 66_000
    assert sizes == {True, False} if event == "compaction" else sizes == {True}


def test_no_prompt_outgrows_its_window() -> None:
    small = replace(
        SHORT,
        append=Quantiles((0, 1), (9000, 66_000)),
        large_windows=0.0,
        first_context=Quantiles((0, 1), (500, 900)),
    )
    for session in mains(generated.make(sessions=20, habits=small)):
        assert max(turn.input_tokens for turn in session.turns) <= 175_000


def test_a_retry_is_the_same_request() -> None:
    habits = replace(SHORT, retry=1.0)
    for session in mains(generated.make(sessions=3, habits=habits, subagents=0)):
        for first, again in zip(session.turns[::2], session.turns[1::2], strict=True):
            assert again.prompt_blocks == first.prompt_blocks
            assert (again.gap_s, again.output_tokens) == (1.0, first.output_tokens)


def test_a_parent_waits_for_its_agents(made: Workload) -> None:
    named = {session.session_id: session for session in made.sessions}
    agents = [s for s in made.sessions if "/agent-" in s.session_id]
    assert len({s.parent for s in agents}) > 10
    for agent in agents:
        parent = named[agent.parent or ""]
        ends = [end for _, end in turn_times(parent)]
        waits = next(i for i, end in enumerate(ends) if abs(end - agent.start_s) < 1e-6) + 1
        assert parent.turns[waits].kind == "tool"
        assert turn_times(parent)[waits][0] >= turn_times(agent)[-1][1] - 1e-6
        assert agent.user == parent.user


def test_side_calls_are_small(made: Workload) -> None:
    side = [s for s in made.sessions if s.session_id.endswith("/side")]
    assert len(side) == 60
    for session in side:
        (turn,) = session.turns
        assert 1000 <= turn.input_tokens <= 2000
        assert turn.output_tokens == 30
    none = replace(SHORT, side_calls=0.0)
    assert len(generated.make(sessions=3, habits=none, subagents=0).sessions) == 3


def test_a_person_has_one_to_five_sessions(made: Workload) -> None:
    people: dict[str, int] = {}
    for session in mains(made):
        people[session.user] = people.get(session.user, 0) + 1
    assert set(people.values()) == {1, 2, 3, 4, 5}


def test_other_clients_have_other_layers() -> None:
    mixed = generated.make(sessions=40, clients={"codex": 1, "mini": 3}, subagents=0, habits=SHORT)
    names = [s.session_id.partition("-")[0] for s in mains(mixed)]
    assert set(names) == {"codex", "mini"}
    assert names.count("mini") > names.count("codex")


def test_it_can_be_written_and_read(tmp_path: Path) -> None:
    small = generated.make(sessions=4, seed=2, scale=8, subagents=1.0, habits=SHORT)
    weka.write(small, tmp_path / "w")
    back = weka.make(tmp_path / "w")
    assert back.num_turns == small.num_turns
    assert hit_rate(small) == pytest.approx(hit_rate(back), abs=0.02)
    mooncake.write(small, tmp_path / "m.jsonl")
    assert mooncake.make(tmp_path / "m.jsonl").input_tokens == small.input_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sessions": 0}, "sessions must be"),
        ({"subagents": 1.5}, "subagents must be"),
        ({"subagents": float("nan")}, "subagents must be"),
        ({"span_s": -1.0}, "span_s must be"),
        ({"clients": {"cursor": 1.0}}, "'cursor' is none of claude"),
        ({"clients": {"mini": 0.0}}, "all shares are 0"),
        ({"clients": {"mini": -1.0}}, "clients: mini must be"),
    ],
)
def test_senseless_arguments_are_refused(arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generated.make(**arguments)


# The parts.


def test_blocks_are_the_same_where_the_text_is() -> None:
    texts = Texts(10)
    head, rules = texts.shared(15, "head"), texts.shared(10, "rules")
    assert texts.shared(99, "head") is head
    one, other = texts.own(20), texts.own(20)
    first = texts.blocks([head, rules, one])
    assert len(first) == 4  # 45 tokens
    second = texts.blocks([head, rules, other])
    assert shared_blocks(first, second) == 2  # the third begins in the rules and ends in `one`
    longer = texts.blocks([head, rules, one, other], first)
    assert longer[:4] == first
    assert len(longer) == 6
    assert not set(longer[4:]) & set(first + second)
    assert texts.blocks([head, one])[0] == first[0]
    assert texts.blocks([head, one])[1] != first[1]


def test_samplers() -> None:
    rng = np.random.default_rng(0)
    normal = LogNormal(5.0, 1.0, 50, 500)
    drawn = [normal.draw(rng) for _ in range(4000)]
    assert np.median(drawn) == pytest.approx(np.exp(5.0), rel=0.1)
    assert (min(drawn), max(drawn)) == (50, 500)
    table = Quantiles((0, 0.5, 1), (1, 10, 1000))
    found = [table.at(share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([1, 10**0.5, 10, 100, 1000])
    counts = Counts((0.5, 0.25), LogNormal(0.0, 0.1, 1, 9))
    drawn = [counts.draw(rng) for _ in range(4000)]
    assert set(drawn) == {1.0, 2.0, 3.0}
    assert drawn.count(1.0) / 4000 == pytest.approx(0.5, abs=0.03)
    modes = Mixture(((0.8, normal), (0.2, Quantiles((0, 1), (1, 1)))))
    assert [modes.draw(rng) for _ in range(4000)].count(1.0) / 4000 == pytest.approx(0.2, abs=0.03)
    assert all(0.1 <= LOCAL_TOOLS.draw(rng) <= 600 for _ in range(100))


# The statistics of the whole.


@pytest.fixture(scope="module")
def statistics() -> Any:
    spec = importlib.util.spec_from_file_location("workload_statistics", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_distance_of_two_samples(statistics: Any) -> None:
    one, other = np.arange(10.0), np.arange(10.0) + 5
    assert statistics.distance(one, one) == 0
    assert statistics.distance(one, other) == 0.5
    assert statistics.distance(one, one + 100) == 1
    assert statistics.by_chance(500, 500) == pytest.approx(0.0859, abs=1e-4)
    assert statistics.table_distance(np.arange(1000.0), (100, 250, 500, 750, 900, 990)) < 0.002
    assert statistics.table_distance(np.full(9, 5.0), (5, 5, 5, 5, 6, 7)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("habits", "sessions", "miss"),
    [(MEASURED, 60, 0.06), pytest.param(FITTED, 300, 0.11, marks=pytest.mark.full)],
)
def test_made_sessions_are_shaped_like_recorded_ones(
    statistics: Any, habits: Any, sessions: int, miss: float
) -> None:
    workload = generated.make(sessions=sessions, seed=11, habits=habits, span_s=86_400.0)
    rows = statistics.compared(statistics.columns(workload) | statistics.layer_columns(), None)
    far = {row["column"]: row["distance_to_table"] for row in rows}
    assert set(far) == set(statistics.TABLE)
    assert {name: d for name, d in far.items() if d > 0.28} == {}
    assert statistics.events(workload)["shrinks"] == pytest.approx(0.011, abs=0.007)
    hits = statistics.hits(workload)
    for rate, told in zip(hits, statistics.TABLE_HITS, strict=True):
        assert rate == pytest.approx(told, abs=miss)
