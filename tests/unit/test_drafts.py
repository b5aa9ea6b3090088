# SPDX-License-Identifier: MIT
"""Token drafters through their Python door: what they propose, what they refuse, who sees whom.

That matches and frequencies are right at every prefix is shown by tests/cpp/drafts_test.cpp.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenspeed import _drafts
from tokenspeed.execution.speculation.drafter import Proposal, TokenDrafter
from tokenspeed.execution.speculation.ngram import NgramDrafter
from tokenspeed.execution.speculation.suffix import SuffixDrafter

LAST = 2**31 - 1
ROOT = Path(__file__).resolve().parents[2]


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def extend(drafter: Any, request_id: int, values: list[int]) -> None:
    """One request's next ids."""
    one = np.array([request_id], np.uint64), np.array([len(values)], np.int32)
    drafter.extend(*one, ids(*values))


def suffix_drafter(
    suffix_min_match: int = 2, shared_store_tokens: int = 1 << 20, **more: int
) -> SuffixDrafter:
    return SuffixDrafter(suffix_min_match, shared_store_tokens, **more)


def drafters() -> list[TokenDrafter]:
    return [NgramDrafter(1, 4), suffix_drafter(suffix_min_match=1)]


@pytest.fixture(params=["ngram", "suffix"])
def drafter(request: pytest.FixtureRequest) -> TokenDrafter:
    return {d.name: d for d in drafters()}[request.param]


def test_what_followed_the_longest_match(drafter: TokenDrafter) -> None:
    drafter.add(3, ids(9, 1, 2, 3, 4, 8, 2, 3, 5, 1, 2), b"")
    assert drafter.propose(3, 2) == Proposal([3, 4], 2)
    extend(drafter, 3, [3])
    assert drafter.propose(3, 2) == Proposal([4, 8], 3)
    extend(drafter, 3, [7])
    assert drafter.propose(3, 2) == Proposal([], 0)
    assert drafter.propose(3, 0).ids == []


def test_a_period_goes_on(drafter: TokenDrafter) -> None:
    drafter.add(0, ids(5, 1, 2, 3, 1, 2, 3, 1), b"")
    assert drafter.propose(0, 8).ids == [2, 3, 1, 2, 3, 1, 2, 3]
    drafter.add(1, ids(*[LAST] * 4096), b"")
    assert drafter.propose(1, 5).ids == [LAST] * 5


def test_an_empty_request(drafter: TokenDrafter) -> None:
    drafter.add(0, ids(), b"")
    extend(drafter, 0, [])
    assert drafter.propose(0, 4) == Proposal([])
    extend(drafter, 0, [0, LAST, 0])
    assert drafter.propose(0, 2).ids == [LAST, 0]
    drafter.remove(0)


def test_mistakes_are_named(drafter: TokenDrafter) -> None:
    drafter.add(2**64 - 1, ids(1), b"")
    with pytest.raises(ValueError, match="18446744073709551615"):
        drafter.add(2**64 - 1, ids(2), b"")
    for call in (lambda: extend(drafter, 4, [1]), lambda: drafter.propose(4, 1)):
        with pytest.raises(KeyError, match="4"):
            call()
    with pytest.raises(KeyError, match="4"):
        drafter.remove(4)
    with pytest.raises(ValueError, match="-5 is negative"):
        drafter.add(4, ids(1, -5), b"")
    with pytest.raises(ValueError, match="-1 is negative"):
        extend(drafter, 2**64 - 1, [3, -1])
    with pytest.raises(TypeError):
        drafter.add(4, np.array([1, 2], np.int64), b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens"):
        drafter.propose(2**64 - 1, -1)


def test_options_out_of_range() -> None:
    for bounds in ((0, 3), (4, 3), (1, 65)):
        with pytest.raises(ValueError, match="prompt_lookup_min"):
            NgramDrafter(*bounds)
    with pytest.raises(ValueError, match="suffix_min_match"):
        suffix_drafter(suffix_min_match=0)
    with pytest.raises(ValueError, match="shared_store_tokens"):
        suffix_drafter(shared_store_tokens=-1)
    with pytest.raises(ValueError, match="kept_tokens"):
        suffix_drafter(kept_tokens=-1)


def test_ngrams_take_the_latest_and_suffixes_the_most_frequent() -> None:
    prompt = ids(1, 2, 7, 1, 2, 7, 1, 2, 7, 1, 2, 8, 1, 2)
    for drafter, expected in zip(drafters(), (8, 7), strict=True):
        drafter.add(0, prompt, b"")
        assert drafter.propose(0, 1) == Proposal([expected], 2)


def test_the_latest_counts_twice() -> None:
    drafter = suffix_drafter()
    drafter.add(0, ids(1, 2, 7, 1, 2, 7, 1, 2, 8, 1, 2), b"")
    assert drafter.propose(0, 1).ids == [8]


def test_short_matches_are_left_alone() -> None:
    suffix, ngram = suffix_drafter(suffix_min_match=3), NgramDrafter(3, 4)
    for drafter in (suffix, ngram):
        drafter.add(0, ids(1, 2, 3, 4, 1, 2), b"")
        assert drafter.propose(0, 2) == Proposal([], 0)
        extend(drafter, 0, [3])
        assert drafter.propose(0, 2) == Proposal([4, 1], 3)


def test_outputs_serve_others_of_the_salt_alone() -> None:
    drafter = suffix_drafter()
    drafter.add(0, ids(50), b"mine")
    extend(drafter, 0, [1, 2, 3, 4])
    for other in (b"", b"min", b"mine\0", b"mine"):
        drafter.add(1, ids(1, 2), other)
        assert drafter.propose(1, 2).ids == []  # not before it ended
        drafter.remove(1)
    drafter.remove(0)
    for other in (b"", b"min", b"mine\0"):
        drafter.add(1, ids(1, 2), other)
        assert drafter.propose(1, 2).ids == []
        drafter.remove(1)
    drafter.add(1, ids(1, 2), b"mine")
    assert drafter.propose(1, 2) == Proposal([3, 4], 2)


def test_what_is_kept_can_be_forgotten(drafter: TokenDrafter) -> None:
    for request_id in (0, 1):
        drafter.add(request_id, ids(50, 51, 52), b"s")
        extend(drafter, request_id, [1, 2, 3, 4, 1, 2])
    drafter.remove(0)
    drafter.forget_ended()
    assert drafter.propose(1, 1) == Proposal([3], 2)  # of the request itself
    drafter.add(2, ids(50, 51, 52, 1, 2), b"s")
    assert drafter.propose(2, 2).ids == []


def test_prompts_serve_nobody_else() -> None:
    drafter = suffix_drafter(kept_tokens=100)
    drafter.add(0, ids(1, 2, 3, 4), b"")
    drafter.remove(0)
    drafter.add(1, ids(8, 9, 1, 2), b"")
    assert drafter.propose(1, 2).ids == []


def test_the_request_itself_comes_before_others() -> None:
    drafter = suffix_drafter()
    drafter.add(0, ids(), b"")
    extend(drafter, 0, [1, 2, 3, 4])
    drafter.remove(0)
    drafter.add(1, ids(2, 3, 5, 2, 3), b"")
    assert drafter.propose(1, 1) == Proposal([5], 2)
    drafter.add(2, ids(3, 5, 1, 2, 3), b"")
    assert drafter.propose(2, 1) == Proposal([4], 3)


def test_a_session_keeps_its_history() -> None:
    drafter = _drafts.SuffixDrafter(1, 0, 1000)
    turn = list(range(100))
    drafter.add(0, ids(*turn), b"s")
    extend(drafter, 0, [200, 201, 202])
    drafter.remove(0)
    assert drafter.num_kept_tokens == 103
    drafter.add(1, ids(*turn, 200, 201, 202, 300, 5), b"s")
    assert (drafter.num_kept_tokens, drafter.num_tokens) == (0, 105)
    assert drafter.propose(1, 2) == ([6, 7], 1)
    drafter.remove(1)
    # The answer was rendered anew: what it was is still found.
    drafter.add(2, ids(*turn, 201), b"s")
    assert drafter.num_tokens == 105 + 1 + 64 + 1
    assert drafter.propose(2, 2) == ([202, 300], 1)
    drafter.add(3, ids(*turn, 201), b"other")
    assert drafter.num_tokens == 171 + 101


def test_a_prompt_asked_again_finds_its_answer() -> None:
    drafter = suffix_drafter(shared_store_tokens=0)
    prompt = ids(*range(100))
    drafter.add(0, prompt, b"")
    extend(drafter, 0, [200, 201, 202])
    drafter.remove(0)
    drafter.add(1, prompt, b"")
    assert drafter.propose(1, 3) == Proposal([200, 201, 202], 64)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_hold(data: st.DataObject) -> None:
    stored, kept = (data.draw(st.integers(0, 80)) for _ in range(2))
    drafter = _drafts.SuffixDrafter(1, stored, kept)
    token = st.integers(0, 2)
    for i in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(st.lists(token, max_size=30))
        drafter.add(i, ids(*prompt), data.draw(st.sampled_from([b"", b"a", b"b"])))
        extend(drafter, i, data.draw(st.lists(token, max_size=60)))
        drafter.propose(i, 4)
        drafter.remove(i)
        assert drafter.num_stored_tokens <= stored
        assert drafter.num_kept_tokens <= kept
    assert drafter.num_tokens == drafter.num_stored_tokens + drafter.num_kept_tokens


def test_memory_of_long_prompts() -> None:
    random = np.random.default_rng(0)
    for prompt in (
        random.integers(0, 150_000, 20_000, dtype=np.int32),
        random.integers(0, 2, 20_000, dtype=np.int32),
        np.repeat(ids(7, 8), 10_000),
    ):
        drafter = _drafts.SuffixDrafter(1, 0, 0)
        drafter.add(0, prompt, b"")
        assert drafter.num_bytes <= 60 * drafter.num_tokens
        drafter.remove(0)
        assert (drafter.num_tokens, drafter.num_bytes) == (0, 0)


def test_the_stub_names_what_is_there() -> None:
    text = (ROOT / "tokenspeed" / "_drafts.pyi").read_text()
    for cls in (_drafts.NgramDrafter, _drafts.SuffixDrafter):
        body = text.partition(f"class {cls.__name__}:")[2].partition("\nclass ")[0]
        there = {name for name in dir(cls) if not name.startswith("_")}
        assert set(re.findall(r"def ([a-z]\w+)", body)) == there


@pytest.mark.parametrize("make", [suffix_drafter, lambda: NgramDrafter(2, 3)])
def test_all_rows_of_a_step_at_once(make: Callable[[], TokenDrafter]) -> None:
    drafter = make()
    for request_id in (1, 2):
        drafter.add(request_id, np.array([3, 4, 5, 6, 7, 8], np.int32), b"")
    ids = np.array([2, 1], np.uint64), np.array([1, 3], np.int32)
    assert drafter.extend(*ids, np.array([9, 4, 5, 6], np.int32)) == [0, 3]
    assert drafter.propose(1, 2) == Proposal([7, 8], 3)
    with pytest.raises(ValueError, match="add up"):
        drafter.extend(*ids, np.array([9], np.int32))
    with pytest.raises(KeyError, match="7"):
        drafter.extend(np.array([7], np.uint64), ids[1][:1], np.array([9], np.int32))
