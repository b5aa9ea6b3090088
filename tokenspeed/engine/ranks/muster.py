# SPDX-License-Identifier: MIT
"""Rank 0's start: has the others started, meets them, and tells them where tensors travel.

Knows configurations and processes; refuses to know what ranks do once they are there.
"""

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.config import EngineConfig
from tokenspeed.engine.part import Agreement, device_of, mesh_of
from tokenspeed.engine.ranks.connection import Kind
from tokenspeed.engine.ranks.crew import GRACE_S, Crew
from tokenspeed.engine.ranks.hello import Hello
from tokenspeed.engine.ranks.local import LocalRanks
from tokenspeed.engine.ranks.meeting import Meeting
from tokenspeed.engine.ranks.wires import choose_wires, make_communicator
from tokenspeed.errors import RankDiedError
from tokenspeed.execution.cpu_share import take_cpu_share
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.shm_ring import RingWriter

START_TIMEOUT_S = 60.0  # for all ranks to connect; one that ends meanwhile is noticed at once


@dataclass
class Mustered:
    """The other ranks; none on a mesh of one."""

    crew: Crew | None = None
    communicator: Communicator | None = None
    num_neighbours: int = 1  # ranks on this machine, this one included

    def agree(self, mine: Agreement) -> Agreement:
        """The least of what the ranks propose. `RankDiedError`."""
        if self.crew is None:
            return mine
        others = [Agreement(**facts) for facts in self.crew.answers(Kind.SIZED).values()]
        least = Agreement(min(each.num_pages for each in (mine, *others)))
        self.crew.tell(Kind.PAGES, **least.facts())
        return least

    def wait_until_ready(self) -> None:
        """Every rank has loaded. `RankDiedError`."""
        if self.crew is not None:
            self.crew.wait_for(Kind.READY)

    def close(self) -> None:
        """Ends the other ranks, if an engine is not to be."""
        if self.crew is not None:
            self.crew.close()


def muster(
    config: EngineConfig,
    folder: Path,
    num_sharers: int,
    on_death: Callable[[RankDiedError], None] | None,
) -> Mustered:
    """Meets all other ranks of the engine. `RankDiedError` says which did not come, or why."""
    mesh, device = mesh_of(config), device_of(config)
    if mesh.num_ranks == 1:
        return Mustered()
    meeting = Meeting()
    mine = Hello.of_this_process(0, meeting.token, config.digest())
    local = LocalRanks(meeting, mesh.num_ranks)
    try:
        with contextlib.closing(meeting):
            local.start()
            connections, hellos = meeting.gather(mine, mesh.num_ranks, START_TIMEOUT_S, local.check)
    except BaseException:
        local.kill()
        raise
    hosts = {hello.host for hello in hellos.values()} | {mine.host}
    neighbours = sorted(rank for rank, hello in hellos.items() if hello.host == mine.host)
    ring_name = f"tokenspeed-{os.getpid()}-{secrets.token_hex(6)}" if neighbours else None
    ring = RingWriter(ring_name, len(neighbours)) if ring_name else None
    wires = choose_wires(mesh.num_ranks, device, hosts, meeting.host)
    count = len(neighbours) + 1
    for rank, connection in connections.items():
        here = rank in neighbours
        place = neighbours.index(rank) if here else 0
        connection.send_json(
            Kind.WELCOME,
            config=config.to_json(),
            folder=str(folder),
            wires=wires,
            ring=ring_name if here else None,
            num_readers=len(neighbours),
            reader=place,
            cpu_share=[place + 1, count] if here else [0, 1],
            num_sharers=num_sharers * count,
        )
    crew = Crew(connections, ring, frozenset(neighbours), lambda: local.wait(GRACE_S))
    if on_death is not None:
        crew.on_death(on_death)
    try:
        take_cpu_share(0, count)
        communicator = make_communicator(0, wires)
        if ring is not None:
            ring.connect()
    except BaseException:
        crew.close()
        crew.check()
        raise
    return Mustered(crew, communicator, count)
