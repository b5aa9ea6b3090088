# SPDX-License-Identifier: MIT
"""Every format of answers, however its text is cut: the events are those of the whole text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tests.unit.parser_cases import (
    WRITERS,
    expected,
    parse,
    some_said,
    some_text,
    steps_of,
    with_calls,
)
from tokenspeed.text.channels import Event, Format, Inputs, Piece
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.parsers import FORMATS, choose
from tokenspeed.text.tokenizer import Tokenizer

NAMES = list(FORMATS)
FULL_CASES = 110_000
PLAIN: frozenset[str] = frozenset()


def tokenizer_with(markers: tuple[str, ...]) -> Tokenizer:
    """Bytes, and the markers as added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(list(markers))
    return Tokenizer(made)


def token_steps(tokenizer: Tokenizer, text: str, sizes: list[int]) -> list[list[Piece]]:
    """The pieces of steps of so many tokens; sizes repeat."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    ids, at, steps = tokenizer.encode(text), 0, []
    while at < len(ids):
        size = sizes[len(steps) % len(sizes)]
        new = ids[at : at + size]
        steps.append([piece for token in new for piece in detokenizer.pieces(token)])
        at += size
    return [*steps, [Piece(detokenizer.finish())]]


def mangled(rng: random.Random, format_: Format, text: str) -> str:
    """`text` cut short, with a part missing, a part twice, or with markup thrown in."""
    a, b = sorted(rng.randint(0, len(text)) for _ in range(2))
    noise = some_text(rng, format_.markers, 3) + rng.choice(["", *format_.markers])
    made = (text[:b], text[:a] + text[b:], text[:b] + text[a:], text[:a] + noise + text[a:], noise)
    return rng.choice([text, *made])


def check_any_cut(format_: Format, inputs: Inputs, text: str, cuts: list[int]) -> list[Event]:
    """The events of the whole text, which are those of every character alone and of `cuts`."""
    whole = parse(format_, inputs, steps_of(text, []))
    assert parse(format_, inputs, steps_of(text, range(len(text)))) == whole, text
    assert parse(format_, inputs, steps_of(text, cuts)) == whole, (text, cuts)
    return whole


def check_seed(format_: Format, seed: int) -> None:
    """One random answer: read back as written, however cut; then mangled."""
    rng = random.Random(seed)
    writer = WRITERS[format_.name]
    said = some_said(rng, format_, writer)
    text = writer.write(said)
    inputs = Inputs(writer.starts_in, said.tools, PLAIN)
    cuts = [rng.randint(0, len(text)) for _ in range(rng.randint(0, 12))]
    whole = check_any_cut(format_, inputs, text, cuts)
    assert with_calls(whole) == expected(said), text
    other = Inputs(rng.choice(["reasoning", "content"]), said.tools[:1], PLAIN)
    check_any_cut(format_, other, mangled(rng, format_, text), cuts)


def test_every_format_has_a_writer() -> None:
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("name", NAMES)
def test_read_back_however_cut(name: str) -> None:
    for seed in range(60):
        check_seed(FORMATS[name], seed)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_read_back_however_cut_often(name: str) -> None:
    for seed in range(1000, 1000 + FULL_CASES // len(NAMES)):
        check_seed(FORMATS[name], seed)


@pytest.mark.parametrize("name", NAMES)
def test_cut_off_anywhere(name: str) -> None:
    format_, writer = FORMATS[name], WRITERS[name]
    several = (some_said(random.Random(seed), format_, writer) for seed in range(20))
    said = min(several, key=lambda said: (not said.calls, abs(len(writer.write(said)) - 300)))
    text = writer.write(said)
    for end in range(len(text)):
        inputs = Inputs(writer.starts_in, said.tools, PLAIN)
        check_any_cut(format_, inputs, text[:end], [end // 2, end // 3, end - 1])


@pytest.mark.parametrize("name", NAMES)
def test_markers_that_are_tokens(name: str) -> None:
    """Steps of 1 to 8 tokens are read as the text is where every marker is a token."""
    format_, writer = FORMATS[name], WRITERS[name]
    tokenizer = tokenizer_with(format_.markers)
    for seed in range(40):
        rng = random.Random(seed)
        said = some_said(rng, format_, writer)
        text = writer.write(said)
        inputs = Inputs(writer.starts_in, said.tools, frozenset(format_.markers))
        sizes = [rng.randint(1, 8) for _ in range(5)]
        for steps in (token_steps(tokenizer, text, [1]), token_steps(tokenizer, text, sizes)):
            assert with_calls(parse(format_, inputs, steps)) == expected(said), text
        bad = mangled(rng, format_, text)
        whole = parse(format_, inputs, token_steps(tokenizer, bad, [10**6]))
        assert parse(format_, inputs, token_steps(tokenizer, bad, sizes)) == whole, bad


@pytest.mark.parametrize("name", [name for name in NAMES if "<think>" in FORMATS[name].markers])
def test_spelled_markers_are_text(name: str) -> None:
    """Where all markers are tokens, text that spells them is no marker."""
    format_ = FORMATS[name]
    inputs = Inputs("content", (), frozenset(format_.markers))
    text = "a <think>b</think> c"
    events = parse(format_, inputs, steps_of(text, [4, 9]))
    assert "".join(event.text for event in events if hasattr(event, "text")) == text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_any_markup_however_cut(name: str, data: st.DataObject) -> None:
    format_ = FORMATS[name]
    words = (*format_.markers, "\n", " ", "f", '{"name": "f", "arguments": {"a": "', '"}}', "{}")
    words += ("<", ">", '"', "\\", "[", "]", ",", "é🙂", "=", '{"a": 1}', "f(a=1)", "null", "</")
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=14)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    start = data.draw(st.sampled_from(["reasoning", "content"]))
    check_any_cut(format_, Inputs(start, (), PLAIN), text, cuts)


def test_names_of_formats() -> None:
    for name in NAMES:
        assert choose("", name).name == name
    with pytest.raises(ValueError, match="hermes"):
        choose("", "hermess")
    assert choose("{{ messages }}").name == "think"
