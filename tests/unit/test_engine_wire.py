# SPDX-License-Identifier: MIT
"""What is sent is what arrives; what is malformed is dropped, counted and never fatal."""

import random
from typing import Any

import pytest

from tokenspeed.config import EngineConfig
from tokenspeed.engine import messages as m
from tokenspeed.engine.wire import Decoder, decode_config, encode, encode_config
from tokenspeed.execution.sampling_params import SamplingParams, TokenLogprobs

PARAMS = SamplingParams(
    logit_bias={3: -1.5},
    bad_words_token_ids=[[1, 2], [3]],
    stop=["é\n"],
    seed=-(2**63),
    max_tokens=None,
)
ENTRY = TokenLogprobs([1, 2], [-0.5, -1.25], [1, 2])
DOWN: list[Any] = [
    m.GenerateRequest(2**64 - 1, [1, 2, 3], PARAMS, [2], b"\x00\xff"),
    m.AbortRequest(2**63),
    m.RetainPrefix(2**64 - 1, [1, 2], b"\xff", m.Retention(60.0, True)),
    m.ReleasePrefix(0, [], b"a"),
    m.FlushCache(),
    m.Shutdown(),
]
UP: list[Any] = [
    m.Loading(0.5, "weights"),
    m.Ready(4096, 32000, 100, 64),
    m.Outputs(
        [
            m.TokenOutput(5, [1, 2], receipt=m.CacheReceipt(64, "diverged", 300.0)),
            m.TokenOutput(6, [7], "stop", 7, 12, [ENTRY], [None, ENTRY], None, 0.25, 0.5),
        ]
    ),
    m.Rejected(9, "no", "top_p", "invalid_value"),
    m.StatsMessage(m.EngineStats(1, 2, 0.5, 3, 4, 5, 1.5, 2.5, 6, 7)),
    m.StatsMessage(
        m.EngineStats(
            speculation=m.SpeculationStats([m.DrafterStats("x", 1, 2, 1, [1, 0])], [3, 1]),
            step_times=m.StepTimeStats(3, 0.5, 0.25, 0.125),
        )
    ),
    m.PrefixPages(2**64 - 1, 3),
    m.Heartbeat(10, True),
    m.Fatal("gone"),
]


@pytest.mark.parametrize("message", DOWN, ids=lambda message: type(message).__name__)
def test_down_comes_back_equal(message: Any) -> None:
    assert Decoder(m.Down).decode(encode(message)) == message


@pytest.mark.parametrize("message", UP, ids=lambda message: type(message).__name__)
def test_up_comes_back_equal(message: Any) -> None:
    assert Decoder(m.Up).decode(memoryview(encode(message))) == message


def test_each_direction_takes_only_its_own() -> None:
    down, up = Decoder(m.Down), Decoder(m.Up)
    assert [down.decode(encode(message)) for message in UP] == [None] * len(UP)
    assert [up.decode(encode(message)) for message in DOWN] == [None] * len(DOWN)
    assert (down.num_dropped, up.num_dropped) == (len(UP), len(DOWN))


def test_malformed_messages_are_dropped_and_counted() -> None:
    decoder = Decoder(m.Down)
    good = encode(DOWN[0])
    bad = [b"", good[:1], good[:2], b"\x02" + good[1:], b"\x01\xff" + good[2:], good + b"\x00"]
    bad += [good[:n] for n in range(2, len(good))]
    bad.append(good.replace(b"\xa5top_p\xcb\x3f\xf0", b"\xa5top_p\xcb\x7f\xf8"))  # 1.0 -> NaN
    bad.append(good[:2] + b"\xdd\xff\xff\xff\xff")  # a list that claims 2^32 entries
    bad.append(good[:2] + b"\x91" * 100_000)  # depth
    assert [decoder.decode(data) for data in bad] == [None] * len(bad)
    assert decoder.num_dropped == len(bad)
    assert decoder.decode(good) == DOWN[0]


def test_random_damage_never_raises() -> None:
    decoder, dice = Decoder(m.Down), random.Random(1)
    good = encode(DOWN[0])
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        decoder.decode(bytes(data))
    assert decoder.num_dropped > 0


def test_the_configuration_survives() -> None:
    config = EngineConfig.of(model="x", served_model_name=("a", "b"), num_pages=7)
    assert decode_config(encode_config(config)) == config
    with pytest.raises(ValueError, match="page_size"):
        decode_config('{"cache": {"page_size": "big"}}')
