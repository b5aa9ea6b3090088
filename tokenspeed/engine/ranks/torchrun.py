# SPDX-License-Identifier: MIT
"""Ranks that torchrun has started: all at once, each a `tokenspeed serve` that finds its place.

Rank 0 is the gateway, and its engine process holds the meeting; it says where in the key-value
store that torchrun keeps. The others wait for that and become workers. Torchrun ends all when one
of them ends. Knows no models.

The store has no access control: whoever reaches MASTER_PORT can read the token.
"""

import json
import os
import signal
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tokenspeed.config import EngineConfig, TorchrunPlace, torchrun_place
from tokenspeed.engine.ranks.starter import LOOPBACK, leave_with_parent, machine_name
from tokenspeed.errors import RankDiedError

if TYPE_CHECKING:  # the gateway reads this file and does without torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from tokenspeed.engine.ranks.meeting import Meeting

MEETING_TIMEOUT_S = 120.0  # for rank 0 to say where to meet
STORE_TIMEOUT_S = 30.0


class TorchrunRanks:
    """A `Starter` that starts nobody: torchrun did."""

    def __init__(self, num_ranks: int) -> None:
        self._place = place = torchrun_place()
        check_size(place, num_ranks)
        if place.rank:
            raise ValueError(
                f"this process is rank {place.rank} of torchrun's, and only rank 0 has an engine:"
                " use launcher torchrun with `tokenspeed serve`, which makes a worker of it"
            )
        self._store: TCPStore | None = None

    def prepare(self) -> str:
        place = self._place
        if place.num_local == place.num_ranks:
            return LOOPBACK
        return own_address_towards(place.host, place.port)

    @property
    def machine(self) -> str:
        return machine_of(self._place)

    def start(self, meeting: "Meeting") -> None:
        where = {"host": meeting.host, "port": meeting.port, "token": meeting.token}
        self._store = connect(self._place, STORE_TIMEOUT_S)
        self._store.set(_key(self._place), json.dumps(where))

    def check(self) -> None:
        """Torchrun watches them and would end this process."""

    def wait(self, timeout_s: float) -> None:
        """Torchrun waits for them."""
        self._store = None

    def kill(self) -> None:
        """They leave with their connections; torchrun ends those that have none."""
        self._store = None


def run_rank(config: EngineConfig, place: TorchrunPlace) -> int:
    """The whole life of a rank that is not 0; returns its exit status. `ValueError`."""
    from tokenspeed.engine.part import mesh_of
    from tokenspeed.engine.ranks.worker import run_worker
    from tokenspeed.models.hub import resolve_model

    leave_with_parent(lambda: os._exit(1))
    check_size(place, mesh_of(config).num_ranks)
    # Rank 0 does the same before it says where to meet: a download counts for no timeout.
    resolve_model(config.model.model, config.model.revision)
    where = find_meeting(place)
    return run_worker(**where, rank=place.rank, config=config.digest(), machine=machine_of(place))


def find_meeting(place: TorchrunPlace, timeout_s: float = MEETING_TIMEOUT_S) -> dict[str, Any]:
    """Where rank 0 holds the meeting: host, port, token. `RankDiedError`: it does not say."""
    key = _key(place)
    store = connect(place, timeout_s)
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        where: dict[str, Any] = json.loads(store.get(key))
    except RuntimeError as error:  # of torch: timeouts and lost connections alike
        raise RankDiedError(
            f"rank 0 has not said where to meet: key {key} in torchrun's store at"
            f" {place.host}:{place.port} is missing after {timeout_s:g} s ({_first_line(error)})"
        ) from None
    return where


def connect(place: TorchrunPlace, timeout_s: float) -> "TCPStore":
    """Torchrun's store; rank 0 keeps one itself where torchrun's agent does not."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    keeps = place.rank == 0 and not place.agent_has_store
    try:
        return TCPStore(
            place.host,
            place.port,
            is_master=keeps,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise RankDiedError(
            f"torchrun's store at {place.host}:{place.port} (MASTER_ADDR, MASTER_PORT) does not"
            f" answer: {_first_line(error)}"
        ) from None


def check_size(place: TorchrunPlace, num_ranks: int) -> None:
    """`ValueError` unless torchrun started as many processes as the engine has ranks."""
    if place.num_ranks != num_ranks:
        raise ValueError(
            f"torchrun started {place.num_ranks} process(es) (WORLD_SIZE), but the parallel sizes"
            f" need {num_ranks} rank(s): change --nproc-per-node and --nnodes, or the sizes"
        )


def machine_of(place: TorchrunPlace) -> str:
    """Processes of one agent stand on one machine; two agents are taken to be two machines."""
    return machine_name(f"node {place.node}" if place.num_local < place.num_ranks else "")


def own_address_towards(host: str, port: int) -> str:
    """The address that this machine has for those who reach `host`. `RankDiedError`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            found: str = probe.getsockname()[0]
            return found
    except OSError as error:
        raise RankDiedError(f"MASTER_ADDR {host} cannot be reached: {error}") from None


def stop_with_parent() -> None:
    """As if torchrun had told this process to end, when it did not get to that."""
    leave_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _key(place: TorchrunPlace) -> str:
    return f"tokenspeed/{place.run_id}/{place.restart}/meeting"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
