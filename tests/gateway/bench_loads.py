# SPDX-License-Identifier: MIT
"""Small loads of the tests, and their runs against scripted servers on a clock of their own."""

import asyncio

from tests.gateway.scripted_endpoint import Reply, chat_pieces, run_virtual
from tokenspeed.bench.client import Endpoint
from tokenspeed.bench.load import LoadOptions, run_load
from tokenspeed.bench.prompts import Prompts
from tokenspeed.bench.session import Session, Turn, Workload

A, B = Endpoint("a", "http://a", "m"), Endpoint("b", "http://b/v1", "m")
TEXTS = Prompts(seed=1)


def turn(blocks, *, gap_s=0.0, out=4, kind="user", **more) -> Turn:
    return Turn(tuple(blocks), 8 * len(blocks), out, gap_s, kind, 0, **more)


def session(name, *turns, start_s=0.0, user="u", parent=None) -> Session:
    return Session(name, turns, 8, start_s, user, parent)


def workload(*sessions) -> Workload:
    return Workload("w", sessions, seed=3, scale=2.0)


def load(servers, sessions, *endpoints, **options):
    """The runs of a workload, on the virtual clock."""
    observe, stop_at = options.pop("observe", None), options.pop("stop_at", None)

    async def run(clock):
        stop = asyncio.Event()
        if stop_at is not None:
            asyncio.get_running_loop().call_at(stop_at, stop.set)
        return await run_load(
            endpoints or (A,),
            workload(*sessions),
            TEXTS,
            LoadOptions(**options),
            observe=observe,
            stop=stop,
            transport=servers,
            clock=clock,
        )

    return run_virtual(run)


def steady(num_tokens=4, step_s=0.5, **how):
    return lambda seen: Reply(chat_pieces(num_tokens, step_s, **how))
