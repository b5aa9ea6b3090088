# SPDX-License-Identifier: MIT
"""The choice by measured times: winners, dispatch by tokens, weight layouts, and overrides."""

import pytest
import torch

from tokenspeed.kernels.registry import (
    Ask,
    Registry,
    force_backends,
    forced_by,
    record_asks,
    select,
)
from tokenspeed.kernels.table import Dispatcher, Times, pick
from tokenspeed.kernels.table_files import Tables

PLAIN = {"fast": None, "wide": None, "reference": None}


def pack(weight: object) -> object:
    return ("packed", weight)


@pytest.mark.parametrize(
    ("times", "ranges"),
    [
        ({}, ((0, "fast"),)),
        ({8: {"fast": 2.0, "wide": 1.0}}, ((0, "wide"),)),
        ({8: {"fast": 2.0, "wide": 1.95}}, ((0, "fast"),)),  # too close to matter
        ({8: {"fast": 2.0}}, ((0, "fast"),)),  # the other was not measured
        (
            {1: {"fast": 1.0, "wide": 2.0}, 64: {"fast": 9.0, "wide": 3.0}},
            ((0, "fast"), (2, "wide")),
        ),
        (
            {b: {"fast": f, "wide": 2.0} for b, f in ((1, 1.0), (8, 1.0), (64, 4.0), (512, 1.0))},
            ((0, "fast"), (9, "wide"), (65, "fast")),
        ),
        ({8: {"fast": 2.0, "wide": 3.0, "reference": 1.0}}, ((0, "fast"),)),
    ],
)
def test_who_is_picked(times: Times, ranges: tuple[tuple[int, str], ...]) -> None:
    assert pick(PLAIN, times).ranges == ranges


def test_backends_of_one_layout_share_an_op() -> None:
    """The packed one wins alone where it is better on the whole, and is never mixed with others."""
    layouts = {"plain": None, "other": None, "packed": pack}
    times = {1: {"plain": 4.0, "other": 5.0, "packed": 1.0}, 64: {"plain": 3.0, "other": 2.0}}
    times[64]["packed"] = 4.0
    assert pick(layouts, times).ranges == ((0, "packed"),)
    times[1]["packed"] = 3.9
    assert pick(layouts, times).ranges == ((0, "plain"), (2, "other"))
    assert pick(layouts, times, by_tokens=False).ranges == ((0, "other"),)


def test_what_stands_behind_the_reference_stays_there() -> None:
    assert pick({"reference": None, "slow": None}, {1: {"slow": 1.0}}).ranges == ((0, "reference"),)
    assert pick({}, {}).ranges == ()


class Measured(Tables):
    """Tables of one row."""

    def __init__(self, times: Times) -> None:
        super().__init__(())
        self._times = times

    def times(self, *asked: object) -> Times:
        return self._times


def registry(times: Times, call: str = "(x[T,D]) -> [T,D]") -> Registry:
    made = Registry(tables=Measured(times))
    made.sources.loaded = made.sources.gpu_loaded = True
    made.define("double", call, lambda x: x * 2)
    made.register("double", "few", lambda x: ("few", len(x)), priority=2)
    made.register("double", "many", lambda x: ("many", len(x)), priority=1)
    return made


def test_a_dispatcher_takes_the_fastest_for_the_tokens() -> None:
    made = registry({4: {"few": 1.0, "many": 2.0}, 32: {"few": 9.0, "many": 3.0}})
    ask = Ask("double", "cpu", torch.float32, {})
    kernel = made.select(ask)
    assert isinstance(kernel, Dispatcher)
    assert [kernel(torch.zeros(n, 1))[0] for n in (0, 1, 4, 5, 32, 999)] == [
        "few", "few", "few", "many", "many", "many"
    ]  # fmt: skip
    assert made.pack_of(kernel) is None
    reasons = {v.backend: (v.chosen, v.reason) for v in made.explain(ask)}
    assert reasons["few"] == (True, "fastest as measured, for 0 to 4 tokens")
    assert reasons["many"] == (True, "fastest as measured, for 5 up tokens")
    assert made.select(ask, "many")(torch.zeros(1, 1))[0] == "many"


def test_an_op_without_tokens_has_one_winner() -> None:
    times = {4: {"few": 1.0, "many": 2.0}, 32: {"few": 9.0, "many": 3.0}}
    made = registry(times, "(cache, pages[n] int64) -> None")
    ask = Ask("double", "cpu", torch.float32, {})
    assert made.select(ask)(torch.zeros(1))[0] == "many"
    reasons = {v.backend: v.reason for v in made.explain(ask)}
    assert reasons["few"] == "3.00 times the time of many at 32 tokens"


def test_packing_hooks() -> None:
    made = registry({})
    made.register("double", "packed", print, priority=9, pack=pack)
    kernel = made.select(Ask("double", "cpu", torch.float32, {}))
    assert made.pack_of(kernel) is pack
    assert made.pack_of(made.select(Ask("double", "cpu", torch.float32, {}), "few")) is None


def test_architectures() -> None:
    made = registry({})
    made.register("double", "new", print, archs=("sm_90", "gfx9*"), priority=9)
    chosen = {}
    for device, arch in (("cuda", "sm_90"), ("cuda", "gfx950"), ("cuda", "sm_80"), ("cpu", "")):
        verdicts = made.explain(Ask("double", device, torch.float32, {}, arch))
        chosen[arch] = next(v.backend for v in verdicts if v.chosen)
        if arch == "sm_80":
            assert verdicts[0].reason == "runs on sm_90, gfx9*, not on sm_80"
    assert chosen == {"sm_90": "new", "gfx950": "new", "sm_80": "few", "": "few"}


def test_options_that_force_backends() -> None:
    assert forced_by(["linear=reference", "rms_norm=cpu"]) == {
        "linear": "reference",
        "rms_norm": "cpu",
    }
    assert forced_by(["*=reference"]) == {"*": "reference"}
    for wrong, says in (
        ("linear=nobody", "linear has the backends cpu, reference"),
        ("linear", "linear has the backends"),
        ("no_op=cpu", "unknown op 'no_op'"),
    ):
        with pytest.raises(ValueError, match=says):
            forced_by([wrong])
    with force_backends({"linear": "reference"}):
        assert hasattr(select("linear"), "__wrapped__")
        assert not hasattr(select("rms_norm"), "__wrapped__")


def test_asks_are_recorded() -> None:
    with record_asks() as asks:
        select("rms_norm", size=7)
    select("rms_norm", size=8)
    assert [(ask.op, ask.shapes) for ask in asks] == [("rms_norm", {"size": 7})]
