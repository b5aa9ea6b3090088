# SPDX-License-Identifier: MIT
"""The scheduler through its binding, with a fake model. Knows the layouts of plan.h, no tensors."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.fake_device import FakeDevice, expected_output
from tokenspeed import _scheduler

KEY = bytes(range(16))
Mode = dict[str, int]
MODES: list[Mode] = [
    {},
    {"overlap_depth": 1},
    {"num_micro_steps": 2},
    {"num_micro_steps": 3},
]


def make(**options: int | bool | bytes) -> _scheduler.Scheduler:
    defaults = {
        "num_pages": 64,
        "page_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 200,
        "hash_key": KEY,
    }
    return _scheduler.Scheduler(**(defaults | options))  # type: ignore[arg-type]


def depth_of(mode: Mode) -> int:
    return mode.get("overlap_depth", 0) + mode.get("num_micro_steps", 1) - 1


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length, dtype=np.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 4, 5, 40])
def test_one_request_gets_the_models_tokens(length: int, mode: Mode) -> None:
    scheduler = make(**mode)
    device = FakeDevice(scheduler, depth_of(mode))
    scheduler.submit(7, prompt(length), max_tokens=11)
    device.run()
    assert device.outputs[7] == expected_output(prompt(length), 11)
    assert device.finish[7] == _scheduler.FINISH_LENGTH
    assert not scheduler.has_work()


def test_a_full_hit_computes_only_the_last_page_again() -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    for request_id, cached in ((1, 0), (2, 36)):
        scheduler.submit(request_id, prompt(40), max_tokens=3)
        device.run()
        assert device.outputs[request_id] == expected_output(prompt(40), 3)
        assert device.num_cached[request_id] == cached


def test_the_next_turn_hits_what_was_decoded() -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(10), max_tokens=20)
    device.run()
    turn = np.concatenate([prompt(10), np.array(device.outputs[1] + [3, 1], np.int32)])
    scheduler.submit(2, turn, max_tokens=2)
    device.run()
    assert device.num_cached[2] == 28  # 29 of the 30 tokens were computed: seven full pages
    assert device.outputs[2] == expected_output(turn, 2)


@pytest.mark.parametrize("options", [{"salt": b"a"}, {"read_cache": False}])
def test_salts_and_opting_out_share_nothing(options: dict[str, bytes | bool]) -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(40), max_tokens=3)
    device.run()
    scheduler.submit(2, prompt(40), max_tokens=3, **options)  # type: ignore[arg-type]
    device.run()
    assert device.num_cached[2] == 0


def test_prompt_logprobs_ask_for_every_row_of_the_prompt() -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(40), max_tokens=3, prompt_logprobs=True)
    device.run()
    flags = [row.flags for row in device.rows]
    assert [bool(f & 2) for f in flags] == [True, True, True, False, False]


def test_stop_ids_wait_for_min_tokens() -> None:
    tokens = expected_output(prompt(9), 8)
    stop = np.array([tokens[2], tokens[5]], np.int32)
    for min_tokens, length in ((0, 3), (3, 3), (4, 6)):
        scheduler = make()
        device = FakeDevice(scheduler, 0)
        scheduler.submit(1, prompt(9), max_tokens=8, min_tokens=min_tokens, stop_ids=stop)
        device.run()
        assert device.outputs[1] == tokens[:length]
        assert device.finish[1] == _scheduler.FINISH_STOP


@pytest.mark.parametrize("mode", MODES)
def test_retraction_changes_no_token(mode: Mode) -> None:
    scheduler = make(num_pages=12, **mode, enable_prefix_caching=False)
    device = FakeDevice(scheduler, depth_of(mode))
    for i in range(4):
        scheduler.submit(i, prompt(8, i), max_tokens=20)
    device.run()
    for i in range(4):
        assert device.outputs[i] == expected_output(prompt(8, i), 20)
    stats = scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_pages == 12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_step_returns_everything(steps: int, mode: Mode) -> None:
    scheduler = make(**mode)
    device = FakeDevice(scheduler, depth_of(mode))
    scheduler.submit(1, prompt(40), max_tokens=20)
    scheduler.submit(2, prompt(9, 2), max_tokens=20)
    for _ in range(steps):
        device.step()
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    seen = len(device.outputs.get(1, []))
    device.run()
    assert len(device.outputs.get(1, [])) == seen
    assert device.outputs[2] == expected_output(prompt(9, 2), 20)
    stats = scheduler.stats()
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


def test_abort_keeps_the_finished_prefill() -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(60), max_tokens=2)
    device.step()
    device.step()
    scheduler.abort(1)
    scheduler.submit(2, prompt(60), max_tokens=2)
    device.run()
    assert device.num_cached[2] == 32


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_row_ends_its_request_alone(mode: Mode) -> None:
    scheduler = make(**mode)
    device = FakeDevice(scheduler, depth_of(mode), fails=lambda request, start: request == 1)
    scheduler.submit(1, prompt(9), max_tokens=5)
    scheduler.submit(2, prompt(9, 2), max_tokens=5)
    device.run()
    assert device.finish == {1: _scheduler.FINISH_ERROR, 2: _scheduler.FINISH_LENGTH}
    assert device.outputs[2] == expected_output(prompt(9, 2), 5)
    assert scheduler.stats().num_cached_pages == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.array([], np.int32)}, "empty"),
        ({"prompt": prompt(200)}, "max_model_len"),
        ({"prompt": prompt(60), "max_tokens": 100}, "never fit"),
        ({"request_id": 1}, "already in use"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"prompt": np.array([-1], np.int32)}, "negative id"),
    ],
)
def test_bad_requests_are_refused(change: dict[str, object], message: str) -> None:
    scheduler = make(num_pages=16)
    scheduler.submit(1, prompt(3), max_tokens=3)
    arguments: dict[str, object] = {"request_id": 2, "prompt": prompt(3), "max_tokens": 3}
    with pytest.raises(ValueError, match=message):
        scheduler.submit(**(arguments | change))  # type: ignore[arg-type]
    scheduler.check_invariants()


@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 0},
        {"page_size": 0},
        {"overlap_depth": 2},
        {"num_micro_steps": 0},
        {"num_micro_steps": 2, "overlap_depth": 1},
        {"max_num_batched_tokens": 3},
        {"hash_key": b"short"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, int | bytes]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def _damage(index: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(result: np.ndarray) -> np.ndarray:
        result = result.copy()
        result[index] = value
        return result

    return change


@pytest.mark.parametrize(
    "change",
    [_damage(i, -7) for i in range(12) if i != 7]  # word 7 of the header is spare
    + [lambda r: r[:-1], lambda r: np.append(r, np.int32(1)), lambda r: r[:3]],
)
def test_a_malformed_result_changes_nothing(change: Callable[[np.ndarray], np.ndarray]) -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(3), max_tokens=3)
    plan = scheduler.next_plan()
    assert plan is not None
    result = device.compute(plan)
    bad = change(result)
    if np.array_equal(bad, result):
        pytest.fail("the damage must show")
    with pytest.raises(ValueError, match="commit"):
        scheduler.commit(bad)
    scheduler.check_invariants()
    assert list(scheduler.commit(result).ids) == expected_output(prompt(3), 1)


def test_planning_beyond_the_depth_is_refused() -> None:
    scheduler = make()
    scheduler.submit(1, prompt(3), max_tokens=3)
    assert scheduler.next_plan() is not None
    with pytest.raises(ValueError, match="overlap_depth"):
        scheduler.next_plan()


@pytest.mark.parametrize("mode", MODES)
def test_replay_gives_the_same_plans(mode: Mode) -> None:
    scheduler = make(num_pages=20, **mode, record_events=True)
    device = FakeDevice(scheduler, depth_of(mode))
    for i in range(6):
        scheduler.submit(i, prompt(5 + 7 * i, i % 3), max_tokens=9, salt=bytes(i % 2))
        device.step()
    scheduler.abort(4)
    device.run()
    plans = _scheduler.replay(scheduler.events())
    assert len(plans) == len(device.plans)
    assert all(np.array_equal(a, b) for a, b in zip(plans, device.plans, strict=True))
    with pytest.raises(ValueError, match="cut short"):
        _scheduler.replay(scheduler.events()[:-1])


def test_equal_prompts_are_computed_once() -> None:
    scheduler = make(max_num_batched_tokens=32)
    device = FakeDevice(scheduler, 0)
    for i in range(3):
        scheduler.submit(i, prompt(101), max_tokens=2)
    device.run()
    assert [device.num_cached[i] for i in range(3)] == [0, 100, 100]


def test_a_short_prompt_passes_a_long_one_within_two_steps() -> None:
    scheduler = make(max_num_batched_tokens=16)
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(150), max_tokens=2)
    device.step()
    scheduler.submit(2, prompt(8, 2), max_tokens=2)
    device.step()
    device.step()
    assert len(device.outputs[2]) == 1


def test_requests_are_admitted_in_order_of_arrival() -> None:
    scheduler = make(num_pages=14, max_num_seqs=3)
    device = FakeDevice(scheduler, 0)
    lengths = [30, 3, 25, 2, 12, 1, 20]
    for i, length in enumerate(lengths):
        scheduler.submit(i, prompt(length, i), max_tokens=6)
    device.run()
    assert list(device.first_row) == list(range(len(lengths)))


def test_a_retracted_request_comes_back_before_later_arrivals() -> None:
    scheduler = make(num_pages=8, max_num_seqs=3, enable_prefix_caching=False)
    device = FakeDevice(scheduler, 0)
    for i in range(8):
        scheduler.submit(i, prompt(4, i), max_tokens=20)
    device.run()
    assert scheduler.stats().num_preemptions > 0
    assert list(device.finish) == list(range(8))


def test_reused_ids_are_new_requests() -> None:
    scheduler = make(overlap_depth=1)
    device = FakeDevice(scheduler, 1)
    scheduler.submit(1, prompt(20), max_tokens=9)
    device.step()
    device.step()
    assert scheduler.abort(1)  # a step in flight still reads its pages
    device.outputs.clear()
    scheduler.submit(1, prompt(7, 5), max_tokens=4)
    device.run()
    assert device.outputs[1] == expected_output(prompt(7, 5), 4)


def test_flush_drops_only_what_no_request_uses() -> None:
    scheduler = make()
    device = FakeDevice(scheduler, 0)
    scheduler.submit(1, prompt(40), max_tokens=2)
    device.run()
    cached = scheduler.stats().num_cached_pages
    assert cached == 10
    scheduler.submit(2, prompt(40), max_tokens=9)
    device.step()
    assert scheduler.flush_cache() == 1
    device.run()
    assert device.outputs[2] == expected_output(prompt(40), 9)


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_arrays_of_another_type_are_refused(dtype: type) -> None:
    with pytest.raises(TypeError):
        make().submit(1, prompt(4).astype(dtype), max_tokens=2)
