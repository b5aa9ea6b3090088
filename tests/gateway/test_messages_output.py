# SPDX-License-Identifier: MIT
"""Any answer in any pieces: the stream is in order and adds up to the whole message's blocks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway import anthropic_events as events
from tokenspeed.gateway.answer import Block
from tokenspeed.gateway.messages_output import Blocks, call_input, signature, whole_block
from tokenspeed.text.channels import CallArguments, CallEnd, CallStart, Content, Reasoning, joined

TEXT = st.text(' \n\taé🙂"\\', max_size=6)
RUNS = st.lists(
    st.one_of(
        st.builds(lambda text: [Content(text)], TEXT),
        st.builds(lambda text: [Reasoning(text)], TEXT),
        st.builds(
            lambda value, complete: [
                CallStart("f", "call_1"),
                CallArguments(json.dumps({"a": value})),
                CallEnd(complete),
            ],
            TEXT,
            st.booleans(),
        ),
    ),
    max_size=6,
)


def pieces(draw, made):
    """The same events with their texts cut and the whole in groups."""
    cut = []
    for event in made:
        if isinstance(event, Content | Reasoning | CallArguments):
            at = draw(st.integers(0, len(event.text)))
            cut += [type(event)(event.text[:at]), type(event)(event.text[at:])]
        else:
            cut.append(event)
    groups = [[]]
    for event in cut:
        if draw(st.booleans()):
            groups.append([])
        groups[-1].append(event)
    return groups


def whole(made, omit):
    """What `Answer` and `Message.whole` make of the events."""
    blocks = []
    for event in joined(made):
        if isinstance(event, CallStart):
            blocks.append(Block("call", event.name, event.id))
        elif isinstance(event, CallArguments):
            blocks[-1].add(event.text)
        elif isinstance(event, Content | Reasoning):
            blocks.append(Block("content" if isinstance(event, Content) else "reasoning"))
            blocks[-1].add(event.text)
    shown = [block for block in blocks if block.kind == "call" or block.text.strip()]
    return [json.loads(events.ENCODER.encode(whole_block(block, omit))) for block in shown]


@settings(max_examples=300, deadline=None)
@given(st.data(), RUNS, st.booleans())
def test_any_pieces(data, runs, omit):
    made = [event for run in runs for event in run]
    stream, reader = Blocks(omit), events.Reader()
    reader.state, reader.message = "between", {"content": []}
    for group in pieces(data.draw, made):
        for event in events.parse(stream.of(group).decode()):
            reader.feed(event)
    for event in events.parse(stream.close().decode()):
        reader.feed(event)
    assert reader.state == "between"
    assert reader.message["content"] == whole(made, omit)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"a": 1}', b'{"a": 1}'),
        ('{"a": "\\ud800"}', b'{"a": "\\ud800"}'),
        ("", b"{}"),
        ('{"a": 1', b"{}"),
        ("[1]", b"{}"),
        ('{"a": NaN}', b"{}"),
        ('{"a": ' + "9" * 5000 + "}", b"{}"),
        ('{"a": ' + "[" * 100_000, b"{}"),
    ],
)
def test_input_of_calls(arguments, given):
    assert bytes(call_input(arguments)) == given


def test_signatures_tell_thoughts_apart():
    assert signature("a") == signature("a") != signature("b")
