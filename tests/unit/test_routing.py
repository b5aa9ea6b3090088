# SPDX-License-Identifier: MIT
"""The rule that chooses a target, and the record of prefixes that it is fed from."""

import random

import numpy as np
import pytest

from tokenspeed.engine.routing import MIN_BLOCK, Load, PrefixRouter, pick

IDLE = Load()
PAGE = 64


def ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=length)


class World:
    """A router whose targets all have the same load unless a test says otherwise."""

    def __init__(self, targets: int = 3, pages: int = 1000, page_size: int = PAGE) -> None:
        self.router = PrefixRouter([pages] * targets, page_size)
        self.loads: list[Load | None] = [IDLE] * targets

    def look(self, prompt, salt: bytes = b""):
        return self.router.choose(prompt, salt, self.loads)

    def send(self, prompt, salt: bytes = b"") -> int:
        route = self.look(prompt, salt)
        self.router.record(route)
        return route.target


def test_the_rule_in_numbers() -> None:
    assert pick([100, 0], [IDLE, IDLE]) == 0
    assert pick([0, 100], [IDLE, IDLE]) == 1
    # Waiting tokens count an eighth, and only in difference.
    assert pick([100, 0], [Load(8 * 99), IDLE]) == 0
    assert pick([100, 0], [Load(8 * 101), IDLE]) == 1
    assert pick([100, 0], [Load(8 * 1099), Load(8 * 1000)]) == 0
    assert pick([100, 0], [Load(8 * 1101), Load(8 * 1000)]) == 1
    # An open request costs a fixed number of tokens.
    assert pick([2 * 1024 + 1, 0], [Load(0, 5), Load(0, 3)]) == 0
    assert pick([2 * 1024 - 1, 0], [Load(0, 5), Load(0, 3)]) == 1
    # Both together.
    assert pick([1024 + 100, 0], [Load(8 * 99, 1), IDLE]) == 0
    assert pick([1024 + 100, 0], [Load(8 * 101, 1), IDLE]) == 1


def test_equal_scores_go_to_the_least_load_then_round_robin() -> None:
    assert pick([100, 0], [Load(800), IDLE]) == 1
    assert [pick([0, 0, 0], [IDLE] * 3, last) for last in (-1, 0, 1, 2)] == [0, 1, 2, 0]
    assert pick([0, 0, 0], [IDLE, None, IDLE], last=0) == 2


def test_a_target_that_takes_nothing_is_passed_over() -> None:
    assert pick([100, 0], [None, Load(10**9)]) == 1
    assert pick([100, 0], [None, None]) is None
    assert pick([], []) is None


def test_a_session_stays_where_it_began() -> None:
    world = World()
    prompts = [ids(i, 2000) for i in range(9)]
    homes = [world.send(prompt) for prompt in prompts]
    assert sorted(homes) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for turn in range(5):
        for i, home in enumerate(homes):
            prompts[i] += ids(100 * turn + i, 300)
            route = world.look(prompts[i])
            assert route.target == home
            assert not route.by_load
            held = len(prompts[i]) - 300
            assert held - MIN_BLOCK < route.matched <= held
            world.router.record(route)


def test_load_overrides_a_prefix_and_says_so() -> None:
    world = World(targets=2)
    prompt = ids(1, 10 * MIN_BLOCK)
    assert world.send(prompt) == 0
    world.loads = [Load(8 * 10 * MIN_BLOCK + 8), IDLE]
    route = world.look(prompt)
    assert (route.target, route.matched, route.by_load) == (1, 0, True)
    world.loads = [Load(8 * 10 * MIN_BLOCK - 1), IDLE]
    assert world.look(prompt).target == 0
    world.loads = [None, IDLE]  # full
    route = world.look(prompt)
    assert (route.target, route.by_load) == (1, False)


def test_the_longest_prefix_wins() -> None:
    world = World(targets=2)
    long, fork = ids(1, 20 * MIN_BLOCK), ids(2, 10 * MIN_BLOCK)
    assert world.send(long) == 0
    assert world.send(fork) == 1
    both = fork[: 4 * MIN_BLOCK] + ids(3, 1000)
    assert world.look(both).matched == 4 * MIN_BLOCK
    assert world.look(both).target == 1
    assert world.look(long[: 5 * MIN_BLOCK + 1]).matched == 5 * MIN_BLOCK


def test_what_does_not_begin_alike_shares_nothing() -> None:
    world = World(targets=2)
    prompt = ids(1, 4 * MIN_BLOCK)
    world.send(prompt)
    assert world.look([prompt[0] ^ 1, *prompt[1:]]).matched == 0
    assert world.look(prompt[MIN_BLOCK:]).matched == 0
    changed = [*prompt]
    changed[2 * MIN_BLOCK] ^= 1
    assert world.look(changed).matched == 2 * MIN_BLOCK
    assert world.look(prompt, b"another tenant").matched == 0
    assert world.look(prompt[: MIN_BLOCK - 1]).blocks == []


def test_ids_and_arrays_are_the_same_prompt() -> None:
    world = World(targets=2)
    prompt = ids(1, 1000)
    world.send(prompt)
    assert world.look(np.array(prompt, np.int32)).matched == 1000 // MIN_BLOCK * MIN_BLOCK


@pytest.mark.parametrize("page_size", [1, 16, 48, 64, 128, 256])
def test_the_record_is_no_larger_than_the_cache(page_size: int) -> None:
    pages = 4096 // page_size
    world = World(targets=1, pages=pages, page_size=page_size)
    prompts = [ids(i, 1024) for i in range(20)]
    for prompt in prompts:
        world.send(prompt)
        (record,) = world.router._records
        assert len(record) * world.router._block <= pages * page_size
    held = [world.look(prompt).matched for prompt in prompts]
    assert all(held[-3:])
    assert not any(held[:-5])
    assert sum(held) <= pages * page_size


def test_the_end_of_a_chain_is_forgotten_before_its_front() -> None:
    world = World(targets=1, pages=16 * MIN_BLOCK // PAGE)
    first = ids(1, 10 * MIN_BLOCK)
    world.send(first)
    world.send(ids(2, 10 * MIN_BLOCK))
    assert world.look(first).matched == 6 * MIN_BLOCK


def test_use_keeps_a_prefix() -> None:
    world = World(targets=1, pages=20 * MIN_BLOCK // PAGE)
    system = ids(0, 4 * MIN_BLOCK)
    for i in range(1, 20):
        world.send(system + ids(i, 4 * MIN_BLOCK))
        assert world.look(system).matched == len(system)


def test_a_prompt_as_large_as_a_cache_goes_elsewhere_or_nowhere() -> None:
    router = PrefixRouter([10, 20, 20], PAGE)
    loads = [IDLE, Load(10**6), Load(10**7)]
    assert router.choose(ids(1, 10 * PAGE - 1), b"", loads).target == 0
    assert router.choose(ids(1, 10 * PAGE), b"", loads).target == 1
    assert router.choose(ids(1, 20 * PAGE), b"", loads) is None


def test_forgetting_a_target() -> None:
    world = World(targets=2)
    prompt = ids(1, 1000)
    home = world.send(prompt)
    other = world.send(ids(2, 1000))
    world.router.forget(home)
    assert world.look(prompt).matched == 0
    assert world.look(ids(2, 1000)).target == other
    assert world.look(ids(2, 1000)).matched > 0


def test_two_routers_choose_alike() -> None:
    def run() -> list[tuple[int, int, bool]]:
        rng, world, prompts = random.Random(5), World(pages=100), [ids(0, 500)]
        chosen = []
        for i in range(300):
            prompts.append(rng.choice(prompts)[: rng.randrange(1, 3000)] + ids(i, 400))
            world.loads = [Load(rng.randrange(3000), rng.randrange(4)) for _ in range(3)]
            route = world.look(prompts[-1])
            world.router.record(route)
            chosen.append((route.target, route.matched, route.by_load))
        return chosen

    first = run()
    assert first == run()
    assert {target for target, _, _ in first} == {0, 1, 2}
    assert any(by_load for _, _, by_load in first)
