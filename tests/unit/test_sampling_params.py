# SPDX-License-Identifier: MIT
"""Every field of `SamplingParams` refuses what it cannot mean, by name."""

import math
from typing import Any

import pytest

from tokenspeed.errors import RequestError
from tokenspeed.execution.sampling_params import MAX_LIST, MAX_SEED, SamplingParams

ODD = [math.nan, math.inf, -math.inf, 2**31, 2**63, 2**100, 1e308, "1", [], {}, True, b"1"]
NUMERIC = {
    "n": [0, -1, 129],
    "max_tokens": [0, -1],
    "min_tokens": [-1, 17],
    "temperature": [-0.1, 100.1],
    "top_k": [-2, 1.5],
    "top_p": [0.0, -0.1, 1.1],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, -1.0, 100.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "seed": [-(2**63) - 1, 1.0],
    "logprobs": [-1],
    "prompt_logprobs": [-1],
}
LISTS: dict[str, list[Any]] = {
    "logit_bias": [[1], {"1": 1.0}, {1: math.nan}, {1: "2"}, {1: 101}, {True: 1.0}],
    "allowed_token_ids": [[], [1.5], "12", [True], [None]],
    "bad_words_token_ids": [[1], [[]], [["a"]], "a"],
    "stop_token_ids": [["1"], 3, [2.0]],
    "stop": [[1], 3, [None]],
    "ignore_eos": [1, "true", None],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": ["no"],
}


@pytest.mark.parametrize("name", NUMERIC)
def test_numbers_out_of_range_are_refused_by_name(name: str) -> None:
    for value in NUMERIC[name] + ODD:
        if value == 2**31 and name == "seed":
            continue  # a good seed
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.field == name
        assert name in str(caught.value)


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_the_wrong_kind_are_refused_by_name(name: str) -> None:
    for value in LISTS[name]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.field == name


def test_long_lists_are_refused() -> None:
    with pytest.raises(RequestError, match="at most"):
        SamplingParams(stop_token_ids=[1] * (MAX_LIST + 1))


def test_the_bounds_themselves_are_fine() -> None:
    SamplingParams(
        n=128, max_tokens=2**31 - 1, temperature=0, top_k=-1, top_p=1, min_p=1, seed=MAX_SEED
    )
    SamplingParams(max_tokens=None, min_tokens=5, logit_bias={0: -100, 1: 100.0}, logprobs=0)


def test_one_stop_string_becomes_a_list() -> None:
    one: Any = "end"
    assert SamplingParams(stop=one).stop == ["end"]


def test_stop_ids_join_the_models_and_the_requests() -> None:
    assert SamplingParams(stop_token_ids=[5, 2]).all_stop_ids([2, 9]) == [2, 5, 9]
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).all_stop_ids([2, 9]) == [5]


def test_choices_have_seeds_in_a_row() -> None:
    seeds = [choice.seed for choice in SamplingParams(n=3, seed=MAX_SEED - 1).choices()]
    assert seeds == [MAX_SEED - 1, MAX_SEED, -(2**63)]
    assert [choice.n for choice in SamplingParams(n=2).choices()] == [1, 1]
    assert [choice.seed for choice in SamplingParams(n=2).choices()] == [None, None]
