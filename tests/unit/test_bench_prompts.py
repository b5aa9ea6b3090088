# SPDX-License-Identifier: MIT
"""Block ids as text: the same everywhere, as long as asked, a prefix where the ids say so."""

import json

import pytest

from tokenspeed.bench import prompts
from tokenspeed.bench.prompts import Prompts, calibrated, calibration_text
from tokenspeed.bench.session import Session, Turn

SIZE = 16


def turn(blocks: tuple[int, ...], tail: int, output: int = 40) -> Turn:
    return Turn(blocks, len(blocks) * SIZE + tail, output, 0.0, "user", tail)


def session(*turns: Turn) -> Session:
    return Session("s", turns, SIZE, 0.0, "u", None)


GROWS = session(turn((1, 2), 7), turn((1, 2, 3, 4, 5, 6), 3), turn((1, 2, 3, 4, 5, 6, 7), 0))


def test_a_block_is_the_same_text_wherever_it_stands() -> None:
    first = Prompts(5).text(session(turn((7, 8), 0)), 0).split()
    second = Prompts(5).text(session(turn((1, 7, 8), 0)), 0).split()
    assert len(first) == 2 * SIZE
    assert second[SIZE:] == first
    assert second[:SIZE] != first[:SIZE]


def test_another_seed_is_another_text() -> None:
    assert Prompts(5).text(GROWS, 0) != Prompts(6).text(GROWS, 0)
    assert Prompts(5).text(GROWS, 0) == Prompts(5).text(GROWS, 0)


def test_a_prompt_that_goes_on_begins_with_the_one_before() -> None:
    made = Prompts(0)
    texts = [made.text(GROWS, i) for i in range(3)]
    assert [len(text.split()) for text in texts] == [t.input_tokens for t in GROWS.turns]
    assert texts[1].startswith(texts[0] + " ")
    assert texts[2].startswith(texts[1] + " ")


def test_an_answer_is_what_the_next_prompt_says() -> None:
    made = Prompts(0)
    for i in range(2):
        answer = made.answer(GROWS, i).split()
        assert len(answer) == 40
        rest = made.text(GROWS, i + 1).split()[GROWS.turns[i].input_tokens :]
        common = min(40, len(rest))
        assert answer[:common] == rest[:common]
    assert len(made.answer(GROWS, 2).split()) == 40


@pytest.mark.parametrize("seed", range(20))
def test_the_shortest_answer_has_a_word(seed: int) -> None:
    short = session(turn((1,), 0, output=1))
    assert Prompts(seed, tokens_per_word=3.0).answer(short, 0)


def test_a_conversation_says_the_prompt_with_roles() -> None:
    made = Prompts(0)
    for i in range(3):
        messages = made.conversation(GROWS, i)
        assert " ".join(text for _, text in messages) == made.text(GROWS, i)
        assert messages[-1][0] == "user"
    first, second = made.conversation(GROWS, 0), made.conversation(GROWS, 1)
    assert second[:2] == [first[0], ("assistant", made.answer(GROWS, 0))]
    assert [role for role, _ in second] == ["user", "assistant", "user"]


def test_a_conversation_after_a_compaction_keeps_what_is_shared() -> None:
    made = Prompts(0)
    cut = session(*GROWS.turns, turn((1, 2, 3, 90, 91), 2))
    messages = made.conversation(cut, 3)
    assert " ".join(text for _, text in messages) == made.text(cut, 3)
    assert messages[0] == made.conversation(GROWS, 1)[0]
    assert messages[-1][0] == "user"


def test_a_retry_is_the_same_text_to_the_word() -> None:
    again = session(turn((1, 2), 7), turn((1, 2), 7), turn((1, 2, 3), 1))
    assert Prompts(0).text(again, 0) == Prompts(0).text(again, 1)
    assert Prompts(0).conversation(again, 1) == Prompts(0).conversation(again, 0)


@pytest.mark.parametrize("per_word", [0.7, 1.0, 1.37, 3.3])
def test_lengths_come_out_for_any_tokenizer(per_word: float) -> None:
    long = session(turn(tuple(range(1000)), 5))
    words = len(Prompts(0, per_word).text(long, 0).split())
    assert words * per_word == pytest.approx(1000 * SIZE + 5, rel=0.01)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_ratio_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_word"):
        Prompts(0, bad)


def test_the_ratio_is_of_a_long_text() -> None:
    num_words = len(calibration_text().split())
    assert num_words > 1000
    assert calibrated(2 * num_words) == 2.0
    with pytest.raises(ValueError, match="no token"):
        calibrated(0)


def test_words_are_256_and_differ() -> None:
    assert len(set(prompts._WORDS)) == 256
    assert json.dumps(prompts._WORDS).isascii()
