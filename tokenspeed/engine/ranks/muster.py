# SPDX-License-Identifier: MIT
"""Rank 0's start: has the others started, meets them, and tells them where tensors travel.

Knows configurations and processes; refuses to know what ranks do once they are there.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenspeed.config import EngineConfig
from tokenspeed.engine.part import Agreement, device_of, mesh_of
from tokenspeed.engine.ranks.connection import Connection, Kind
from tokenspeed.engine.ranks.crew import GRACE_S, Crew
from tokenspeed.engine.ranks.hello import Hello
from tokenspeed.engine.ranks.meeting import Meeting
from tokenspeed.engine.ranks.starter import Starter, make_starter
from tokenspeed.engine.ranks.wires import (
    can_share_memory,
    check_wires,
    choose_wires,
    clear_away,
    make_communicator,
    new_name,
)
from tokenspeed.errors import RankDiedError
from tokenspeed.execution.cpu_share import allow_cpus, allowed_cpus, take_cpu_share
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

    def check(self) -> None:
        """`RankDiedError` if a rank has died."""
        if self.crew is not None:
            self.crew.check()

    def wait_until_ready(self) -> None:
        """Every rank has loaded. `RankDiedError`."""
        if self.crew is not None:
            self.crew.wait_for(Kind.READY)

    def close_after(self, error: BaseException) -> None:
        """Ends the other ranks, as an engine is not to be. `RankDiedError` of who died first, if
        `error` is only a consequence."""
        if self.crew is not None:
            self.crew.close_after(error)


def muster(
    config: EngineConfig,
    folder: Path,
    num_sharers: int,
    on_death: Callable[[RankDiedError], None] | None,
) -> Mustered:
    """Meets all other ranks of the engine. `RankDiedError` says which did not come, or why."""
    num_ranks, device = mesh_of(config).num_ranks, device_of(config)
    starter = make_starter(config, num_ranks)
    if num_ranks == 1:
        return Mustered()
    check_wires(device, config.parallel.communication)
    cpus = allowed_cpus()
    with contextlib.ExitStack() as undo:
        undo.callback(starter.kill)
        connections, ranks, host = _meet(starter, config, num_ranks)
        for connection in connections.values():
            undo.callback(connection.close)
        wires = choose_wires(num_ranks, device, ranks.hosts, host, config.parallel.communication)
        ring_name = new_name() if len(ranks.of(0)) > 1 and can_share_memory() else None
        names = [name for name in (ring_name, wires["address"]) if name is not None]
        undo.callback(clear_away, *names)
        readers = ranks.of(0)[1:] if ring_name else []
        ring = RingWriter(ring_name, len(readers)) if ring_name else None
        for rank, connection in connections.items():
            connection.send_json(
                Kind.WELCOME,
                config=config.to_json(),
                folder=str(folder) if rank in ranks.of(0) else None,
                wires=wires,
                names=names,
                ring=[ring_name, len(readers), readers.index(rank)] if rank in readers else None,
                cpu_share=ranks.share(rank),
                num_sharers=num_sharers * len(ranks.of(rank)),
            )
        undo.pop_all()

    communicator: Communicator | None = None

    def ended() -> None:
        starter.wait(GRACE_S)
        if communicator is not None:
            communicator.close()  # this process may be a rank of another engine later
        clear_away(*names)
        allow_cpus(cpus)

    crew = Crew(connections, ring, frozenset(readers), ended)
    if on_death is not None:
        crew.on_death(on_death)
    try:
        take_cpu_share(*ranks.share(0))
        communicator = make_communicator(0, wires)
        if ring is not None:
            ring.connect()
    except BaseException as error:
        crew.close_after(error)
        raise
    return Mustered(crew, communicator, len(ranks.of(0)))


def _meet(
    starter: Starter, config: EngineConfig, num_ranks: int
) -> tuple[dict[int, Connection], "Neighbours", str]:
    """The other ranks, which stand on one machine, and where this one was met."""
    with contextlib.closing(Meeting(starter.prepare())) as meeting:
        mine = Hello.of_this_process(0, meeting.token, config.digest(), starter.machine)
        starter.start(meeting)
        connections, hellos = meeting.gather(mine, num_ranks, START_TIMEOUT_S, starter.check)
    hosts = {0: mine.host} | {rank: each.host for rank, each in hellos.items()}
    return connections, Neighbours(hosts), meeting.host


@dataclass(frozen=True)
class Neighbours:
    """Which ranks stand on one machine."""

    host_of: Mapping[int, str]

    @property
    def hosts(self) -> set[str]:
        return set(self.host_of.values())

    def of(self, rank: int) -> list[int]:
        """The ranks of its machine, itself among them, in order."""
        return sorted(r for r, host in self.host_of.items() if host == self.host_of[rank])

    def share(self, rank: int) -> tuple[int, int]:
        """Which share of its machine is the rank's, of how many."""
        return self.of(rank).index(rank), len(self.of(rank))
