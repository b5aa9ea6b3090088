# SPDX-License-Identifier: MIT
"""Each sampling parameter does what it says, for its own row only; a slot keeps nothing of it."""

from typing import Any

import numpy as np
import pytest
import torch

from tokenspeed.execution.sampler import Sampler, Sequence
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs

VOCAB = 12
SLOTS = 4
PROMPT = [1, 2, 3]


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(max_num_seqs=SLOTS, vocab_size=VOCAB, device=torch.device("cpu"))


def bind(
    sampler: Sampler,
    slot: int,
    outputs: list[int] | None = None,
    stop_ids: Any = (),
    prompt: list[int] = PROMPT,
    **params: Any,
) -> None:
    params.setdefault("temperature", 0.0)
    settings = SamplingParams(**params)
    sequence = Sequence(
        np.array(prompt, np.int32), settings, list(stop_ids), settings.seed or 0, outputs or []
    )
    sampler.bind(slot, sequence, sequence.output_ids)


def falling(rows: int = 1) -> torch.Tensor:
    """Logits 0, -1, -2, ...: token 0 is the likeliest."""
    return -torch.arange(VOCAB, dtype=torch.float32).repeat(rows, 1)


def draw(
    sampler: Sampler, logits: torch.Tensor, slots: list[int], position: int = len(PROMPT)
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    places = torch.full((len(slots),), position)
    ids, logprobs = sampler.sample(logits, np.array(slots, np.int32), places)
    return ids.tolist(), logprobs


def test_greedy_takes_the_largest(sampler: Sampler) -> None:
    bind(sampler, 0)
    assert draw(sampler, falling(), [0])[0] == [0]


@pytest.mark.parametrize(
    ("params", "reachable"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": -1, "min_p": 0.3}, {0, 1}),  # exp(-1) = 0.37, exp(-2) = 0.14
        ({"top_p": 0.7}, {0, 1}),  # 0.63, then 0.86
        ({"top_p": 0.5}, {0}),
        ({"allowed_token_ids": [4, 5]}, {4, 5}),
    ],
)
def test_only_these_tokens_are_drawn(
    sampler: Sampler, params: dict[str, Any], reachable: set[int]
) -> None:
    bind(sampler, 2, temperature=1.0, seed=5, **params)
    drawn = {draw(sampler, falling(), [2], position)[0][0] for position in range(200)}
    assert drawn == reachable


def test_temperature_flattens(sampler: Sampler) -> None:
    bind(sampler, 0, temperature=0.2, seed=1)
    bind(sampler, 1, temperature=50.0, seed=1)
    cold = [draw(sampler, falling(), [0], p)[0][0] for p in range(100)]
    hot = [draw(sampler, falling(), [1], p)[0][0] for p in range(100)]
    assert cold.count(0) > 90
    assert len(set(hot)) == VOCAB


def test_a_seed_gives_the_same_ids_whatever_the_batch_and_the_slot(sampler: Sampler) -> None:
    bind(sampler, 0, temperature=1.0, seed=11)
    alone = [draw(sampler, falling(), [0], p)[0][0] for p in range(50)]
    bind(sampler, 3, temperature=1.0, seed=11)
    bind(sampler, 1, temperature=1.0, seed=12)
    bind(sampler, 2, frequency_penalty=1.0)
    together = [draw(sampler, falling(3), [1, 3, 2], p)[0][1] for p in range(50)]
    assert together == alone
    assert len(set(alone)) > 2


def test_logit_bias_and_its_end_with_the_request(sampler: Sampler) -> None:
    bind(sampler, 0, logit_bias={7: 100.0})
    bind(sampler, 1)
    assert draw(sampler, falling(2), [0, 1])[0] == [7, 0]
    bind(sampler, 0)
    assert draw(sampler, falling(2), [0, 1])[0] == [0, 0]


def test_bad_words_of_one_token_and_of_several(sampler: Sampler) -> None:
    bind(sampler, 0, outputs=[5], bad_words_token_ids=[[0], [5, 1], [5, 1, 4], [3, 2]])
    # 0 is bad alone; 1 would complete [5, 1]; 2 would need a 3 before it.
    assert draw(sampler, falling(), [0])[0] == [2]
    # The 2 just sampled is remembered: now neither sequence applies.
    assert draw(sampler, falling(), [0])[0] == [1]


def test_bad_words_look_at_the_output_only(sampler: Sampler) -> None:
    bind(sampler, 0, bad_words_token_ids=[[3, 0]])  # the prompt ends with 3
    assert draw(sampler, falling(), [0])[0] == [0]


def test_a_phrase_may_end_where_nothing_else_is_left(sampler: Sampler) -> None:
    bind(sampler, 0, outputs=[5], allowed_token_ids=[5], bad_words_token_ids=[[5, 5]])
    assert draw(sampler, falling(), [0])[0] == [5]


def test_min_tokens_masks_stop_ids_until_reached(sampler: Sampler) -> None:
    bind(sampler, 0, stop_ids=[0], min_tokens=2)
    ids = [draw(sampler, falling(), [0], len(PROMPT) + i)[0][0] for i in range(3)]
    assert ids == [1, 1, 0]


def test_repetition_counts_the_prompt_and_the_output(sampler: Sampler) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 6, 9]] = torch.tensor([4.0, 3.9, 3.5])
    bind(sampler, 0, repetition_penalty=1.5)
    assert draw(sampler, logits.clone(), [0])[0] == [6]  # 2 stands in the prompt: 4 / 1.5
    assert draw(sampler, logits.clone(), [0])[0] == [9]  # 6 has been sampled since
    bind(sampler, 0)
    assert draw(sampler, logits.clone(), [0])[0] == [2]


@pytest.mark.parametrize("params", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_presence_and_frequency_ignore_the_prompt(
    sampler: Sampler, params: dict[str, float]
) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 6]] = torch.tensor([4.0, 2.5])
    bind(sampler, 1, **params)
    assert draw(sampler, logits.clone(), [1])[0] == [2]
    assert draw(sampler, logits.clone(), [1])[0] == [6]


def test_frequency_grows_with_the_count(sampler: Sampler) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 5.0
    bind(sampler, 0, outputs=[2, 2, 2, 2], frequency_penalty=1.0)
    assert draw(sampler, logits.clone(), [0])[0] == [2]  # 5 - 4 is still ahead
    assert draw(sampler, logits.clone(), [0])[0] != [2]  # 5 - 5 ties with 0, the lowest id


def test_penalties_touch_their_own_rows_only(sampler: Sampler) -> None:
    bind(sampler, 0, outputs=[0], presence_penalty=2.0)
    bind(sampler, 1)
    logits = falling(2)
    assert draw(sampler, logits, [1, 0])[0] == [0, 1]
    assert torch.equal(logits[0], falling()[0])


def test_a_slot_forgets_its_last_request(sampler: Sampler) -> None:
    """Bug class: sampler state indexed by slot and not cleared when the slot changes hands."""
    everything = {
        "temperature": 5.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.5,
        "repetition_penalty": 9.0,
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
        "logit_bias": {9: 50.0},
        "allowed_token_ids": [9, 10],
        "bad_words_token_ids": [[0]],
        "min_tokens": 3,
        "logprobs": 2,
        "seed": 77,
    }
    bind(sampler, 0, outputs=[0, 0, 1], stop_ids=[0], **everything)
    draw(sampler, falling(), [0])
    bind(sampler, 0)
    assert draw(sampler, falling(), [0]) == ([0], {})
    bind(sampler, 0, presence_penalty=0.5)
    assert draw(sampler, falling(), [0])[0] == [0]
    bind(sampler, 0, temperature=1.0, seed=3)
    bind(sampler, 1, temperature=1.0, seed=3)
    for position in range(30):
        a, b = draw(sampler, falling(2), [0, 1], position)[0]
        assert a == b


def test_a_slot_forgets_the_last_prompt(sampler: Sampler) -> None:
    bind(sampler, 0, prompt=[0, 5], repetition_penalty=9.0)
    bind(sampler, 0, prompt=[1], repetition_penalty=9.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, [0, 1]] = torch.tensor([4.0, 5.0])
    assert draw(sampler, logits, [0])[0] == [0]


def test_logprobs_come_from_the_raw_logits(sampler: Sampler) -> None:
    bind(sampler, 0, logprobs=2, logit_bias={3: 100.0}, temperature=0.5, seed=1)
    bind(sampler, 1)
    bind(sampler, 2, logprobs=0)
    ids, entries = draw(sampler, falling(3), [1, 0, 2])
    assert ids == [0, 3, 0]
    expected = falling()[0].log_softmax(-1)
    assert entries.keys() == {1, 2}
    assert entries[1].token_ids == [3, 0, 1]
    assert entries[1].ranks == [4, 1, 2]
    assert entries[1].logprobs == pytest.approx(expected[[3, 0, 1]].tolist(), abs=1e-6)
    assert entries[2].token_ids == [0]


def test_more_logprobs_than_tokens(sampler: Sampler) -> None:
    bind(sampler, 0, logprobs=99)
    entry = draw(sampler, falling(), [0])[1][0]
    assert entry.token_ids == [0, *range(VOCAB)]
    assert entry.ranks == [1, *range(1, VOCAB + 1)]


def test_a_row_that_is_not_finite_fails_alone(sampler: Sampler) -> None:
    for slot in range(3):
        bind(sampler, slot, temperature=1.0, seed=slot, presence_penalty=1.0, logprobs=1)
    clean, _ = draw(sampler, falling(3), [0, 1, 2])
    for slot in range(3):
        bind(sampler, slot, temperature=1.0, seed=slot, presence_penalty=1.0, logprobs=1)
    logits = falling(3)
    logits[1, 4] = float("nan")
    ids, _ = draw(sampler, logits, [0, 1, 2])
    assert ids == [clean[0], -1, clean[2]]


def test_no_token_allowed_fails_the_row(sampler: Sampler) -> None:
    bind(sampler, 0, allowed_token_ids=[4], bad_words_token_ids=[[4]])
    assert draw(sampler, falling(), [0])[0] == [-1]
