# SPDX-License-Identifier: MIT
"""Tapes of sampled ids against a plain model; keys that clients' rewriting leaves alone."""

import json
import random

import pytest

from tokenspeed.text.history import History, Known, first_difference
from tokenspeed.text.history_keys import (
    ConversationKeys,
    Spoken,
    canonical_arguments,
    thought_digest,
    thought_of,
)


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


@pytest.mark.parametrize("seed", range(20))
def test_random_sessions_against_a_plain_model(seed):
    """Turns go on from any earlier turn; what is found is what was recorded, within the bound."""
    rng = random.Random(seed)
    history = History(rng.choice([3_000, 20_000, 1 << 30]))
    model: dict[int, tuple[list[int], int | None]] = {}
    for number in range(300):
        known: Known | None = None
        before: list[int] = []
        if model and rng.random() < 0.8:
            number_before = rng.choice(list(model)[-6:])
            found = history.find([(0, key_of(number_before), None)])
            if found is not None:
                known = found[1]
                expected, stop = model[number_before]
                assert known.ids() == expected
                assert known.stop == stop
                before = expected + ([stop] if stop is not None and rng.random() < 0.8 else [])
        ids = before + [rng.randrange(100) for _ in range(rng.randint(0, 30))]
        stop = rng.choice([None, 7])
        again = model and rng.random() < 0.1  # the same words sampled again
        number = rng.choice(list(model)) if again else number
        model.pop(number, None)
        model[number] = ids, stop
        history.record([key_of(number)], ids, known, stop, None, b"session")
        assert history.num_bytes <= history.max_bytes
        assert history.last(b"session") in (ids, None)
    check_books(history)
    for number, (ids, _) in model.items():
        found = history.find([(0, key_of(number), None)])
        assert found is None or found[1].ids() == ids
    if history.max_bytes == 1 << 30:
        assert len(history) == len(model)


def check_books(history: History) -> None:
    assert history.num_bytes == sum(tape.num_bytes for tape in history._tapes)
    assert all(not known.tape.gone for known in history._known.values())
    assert {known.tape for known in history._known.values()} <= history._tapes.keys()


def test_a_session_costs_its_longest_list_once():
    history = History(1 << 30)
    known = None
    for turn in range(1, 101):
        history.record([key_of(turn)], list(range(turn * 100)), known, None, None)
        known = history.find([(0, key_of(turn), None)])[1]
    assert len(history._tapes) == 1
    assert history.num_bytes < 8 * 10_000 + 100 * 500


def test_the_oldest_tape_goes_first():
    history = History(20_000)
    for number in range(3):
        history.record([key_of(number)], [number] * 500, None, None, None)
    assert history.find([(0, key_of(0), None)]) is not None  # used last
    for number in range(3, 5):
        history.record([key_of(number)], [number] * 500, None, None, None)
    found = [number for number in range(5) if history.find([(0, key_of(number), None)])]
    assert found == [0, 2, 3, 4]
    history.record([key_of(9)], [9] * 5000, None, None, None)  # more than there is room for
    assert (len(history), history.num_bytes) == (0, 0)


def test_reasoning_that_is_another_ends_what_counts():
    history = History(1 << 20)
    one, two = thought_digest("one"), thought_digest("two")
    history.record([key_of(1)], [1], None, None, one)
    history.record([key_of(2)], [1, 2], history.find([(0, key_of(1), None)])[1], None, two)
    assert history.find([(4, key_of(1), None), (6, key_of(2), None)])[0] == 6
    assert history.find([(4, key_of(1), one), (6, key_of(2), two)])[0] == 6
    assert history.find([(4, key_of(1), one), (6, key_of(2), one)])[0] == 4
    assert history.find([(4, key_of(1), two), (6, key_of(2), two)]) is None


@pytest.mark.parametrize("seed", range(50))
def test_first_difference(seed):
    rng = random.Random(seed)
    a = [rng.randrange(3) for _ in range(rng.randint(0, 40))]
    b = a[: rng.randint(0, len(a))] + [rng.randrange(3) for _ in range(rng.randint(0, 5))]
    pairs = zip(a, b, strict=False)
    plain = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    assert first_difference(a, b) == plain


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1,"b":[2.0]}'}}
ANSWER = {"role": "assistant", "content": "I look.\n\nNow.", "tool_calls": [CALL]}
SAME = [
    {"role": "assistant", "content": " I look.\n\nNow.\n", "tool_calls": [CALL]},
    {
        **ANSWER,
        "content": [{"type": "text", "text": "I look.\n"}, {"type": "text", "text": "Now."}],
    },
    {**ANSWER, "reasoning": "hm", "refusal": None, "annotations": [], "name": "x"},
    {**ANSWER, "tool_calls": [{"id": "c1", "index": 0, "function": CALL["function"]}]},
    {
        **ANSWER,
        "tool_calls": [
            {"id": "c1", "function": {"name": "f", "arguments": ' {"b": [2], "a": 1} '}}
        ],
    },
    {
        **ANSWER,
        "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"a": 1, "b": [2]}}}],
    },
]
OTHER = [
    {**ANSWER, "content": "I look.\nNow."},
    {**ANSWER, "content": None},
    {**ANSWER, "tool_calls": []},
    {**ANSWER, "tool_calls": [CALL, CALL]},
    {**ANSWER, "tool_calls": [{**CALL, "id": "c2"}]},
    {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "g", "arguments": '{"a":1,"b":[2]}'}}]},
    {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a":1,"b":[3]}'}}]},
    {**ANSWER, "role": "user"},
]


def test_an_answer_is_known_however_it_is_written():
    keys = ConversationKeys()
    spoken = Spoken(("I look.\n\nNow.",), (("f", "c1", '{"a": 1, "b": [2.0]}'),))
    made = {keys.follow(b"before", message) for message in spoken.messages()}
    assert made == {keys.follow(b"before", message) for message in SAME}
    assert not made & {keys.follow(b"before", message) for message in OTHER}
    assert len({keys.follow(b"before", message) for message in OTHER}) == len(OTHER)
    assert not made & {keys.follow(b"other", message) for message in SAME}


def test_runs_of_content_may_be_joined_by_anything():
    keys = ConversationKeys()
    made = {
        keys.follow(b"", m) for m in Spoken(("One. ", "Two.\n"), (("f", "1", "{}"),)).messages()
    }
    calls = [{"id": "1", "function": {"name": "f", "arguments": ""}}]
    for content in ("One. Two.", "One.Two.", "One.\nTwo.", "One.\n\nTwo.", ["One.", "Two."]):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        assert keys.follow(b"", message) in made, content


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"content": "a"}, {"content": [{"type": "text", "text": "a"}]}, True),
        ({"content": "a"}, {"content": "a", "cache_control": {"type": "ephemeral"}}, True),
        ({"content": "a"}, {"content": [{"text": "a", "cache_control": {}}]}, True),
        ({"content": "a"}, {"content": "a "}, False),
        ({"content": "a"}, {"content": "a", "name": "b"}, False),
        ({"content": "a"}, {"content": "a", "extra": 1}, False),
        ({"content": "a", "tool_call_id": "1"}, {"content": "a", "tool_call_id": "2"}, False),
        ({"content": [{"type": "image_url"}]}, {"content": ""}, False),
        ({"content": "\ud800"}, {"content": "?"}, False),
    ],
)
def test_what_users_say_is_taken_literally(one, two, same):
    keys = ConversationKeys()
    made = [keys.follow(b"", {"role": "user"} | message) for message in (one, two)]
    assert (made[0] == made[1]) == same


@pytest.mark.parametrize(
    ("arguments", "canonical"),
    [
        ('{"b": 1.0, "a": "x"}', '{"a":"x","b":1}'),
        ('{"n": 1e3, "m": 1.5}', '{"m":1.5,"n":1000}'),
        ('{"n": 12345678901234567890}', '{"n":12345678901234567168}'),
        ('{"s": "\\u00e9"}', '{"s":"\\u00e9"}'),
        ('{"s": "é"}', '{"s":"\\u00e9"}'),
        ("", "{}"),
        (' {"cut": ', '{"cut":'),
        ("1e999", "Infinity"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments(arguments, canonical):
    assert canonical_arguments(arguments) == canonical
    with_json = canonical.startswith("{") and canonical.endswith("}")
    assert not with_json or json.loads(canonical) is not None


def test_thoughts_go_by_any_name_and_spacing():
    digest = thought_digest("so  it\nis")
    for name in ("reasoning", "reasoning_content", "thinking"):
        assert thought_of({name: " so it is\n"}) == digest
    assert thought_of({"reasoning": ""}) is thought_of({"reasoning": 5}) is thought_of({}) is None
