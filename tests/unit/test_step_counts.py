# SPDX-License-Identifier: MIT
"""What steps are made of: every token that is computed is counted once, as what it is."""

import pytest

from tests.fake_model import FakeModel
from tests.unit.test_engine import drain, engine_of, request


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_tokens_of_steps_are_counted_as_what_they_are(overlap_depth: int) -> None:
    engine = engine_of(max_num_batched_tokens=32, overlap_depth=overlap_depth)
    engine.add_request(request(1, list(range(50)), max_tokens=9, ignore_eos=True))
    drain(engine)
    stats = engine.stats()
    # The first of the nine comes of the prompt's second piece.
    assert stats.num_prefill_tokens == 50
    assert stats.num_decode_tokens in (8, 8 + overlap_depth)  # one may be on its way at the end
    assert stats.num_steps == 2 + stats.num_decode_tokens
    assert stats.num_draft_tokens == 0
    assert stats.num_cached_pages == 58 // 4
    assert 0 < stats.busy_s < 60


def test_drafts_are_counted_apart() -> None:
    asked = '{"method": "ngram", "num_speculative_tokens": 3}'
    engine = engine_of(FakeModel(3), speculative_config=asked)
    engine.add_request(request(1, [0, 1, 2] * 9, max_tokens=30, ignore_eos=True))
    drain(engine)
    stats = engine.stats()
    assert stats.speculation is not None
    drafted = sum(one.num_draft_tokens for one in stats.speculation.drafters)
    assert (stats.num_prefill_tokens, stats.num_draft_tokens) == (27, drafted)
    accepted = sum(one.num_accepted_tokens for one in stats.speculation.drafters)
    assert drafted > 0
    assert stats.num_decode_tokens == 29 - accepted
