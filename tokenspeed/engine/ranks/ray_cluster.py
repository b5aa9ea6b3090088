# SPDX-License-Identifier: MIT
"""Ranks on a Ray cluster: Ray finds machines for them, starts them, and ends them with rank 0.

Rank 0 is Ray's driver, not one of its workers: a bundle is kept for it on its own machine. Each
other rank is one task that lasts as long as the engine. Between ranks nothing travels through Ray
but where to meet. Without a cluster a small one is started on this machine, and ended again. Knows
no models.
"""

import contextlib
import importlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.config import Device, ray_address
from tokenspeed.engine.ranks.local import start_worker
from tokenspeed.engine.ranks.starter import LOOPBACK, machine_name
from tokenspeed.errors import RankDiedError

if TYPE_CHECKING:
    from tokenspeed.engine.ranks.meeting import Meeting

PLACEMENT_TIMEOUT_S = 8.0
OBJECT_STORE_BYTES = 80 << 20  # Ray takes no less; nothing of ours goes through it
CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")
PROBE_S = 1.0
PINNED = 0.001  # of a node's own resource: enough to be there
QUIET = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}


class RayRanks:
    """A `Starter` by way of Ray. `ValueError`: Ray is not installed."""

    def __init__(self, num_ranks: int, device: Device) -> None:
        self._ray = import_ray()
        self._num_ranks = num_ranks
        self._unit = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        self._connected = False  # by us
        self._group: Any = None
        self._machines = [machine_name()] * num_ranks
        self._tasks: dict[Any, int] = {}

    @property
    def machine(self) -> str:
        return self._machines[0]

    def prepare(self) -> str:
        """Connects, and has room kept for all ranks. `ValueError`: the cluster is too small."""
        ray = self._ray
        if not ray.is_initialized():
            self._connected = True
            with _signals_kept():
                connect(ray)
        check_room(ray.cluster_resources(), self._unit, self._num_ranks)
        address = str(ray.util.get_node_ip_address())
        bundles = [dict(self._unit) for _ in range(self._num_ranks)]
        bundles[0][f"node:{address}"] = PINNED
        self._group = ray.util.placement_group(bundles, strategy="PACK")
        if not self._group.wait(PLACEMENT_TIMEOUT_S):
            raise RankDiedError(
                f"Ray has no room for {self._num_ranks} ranks of {_amounts(self._unit)}, one of"
                f" them on {address}, within {PLACEMENT_TIMEOUT_S:g} s; free are"
                f" {_amounts(ray.available_resources())}"
            )
        nodes = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        names = {n["NodeID"]: f"{n['NodeManagerHostname']}/{n['NodeID'][:8]}" for n in ray.nodes()}
        self._machines = [names[nodes[rank]] for rank in range(self._num_ranks)]
        return LOOPBACK if len(set(self._machines)) == 1 else address

    def start(self, meeting: "Meeting") -> None:
        strategies = self._ray.util.scheduling_strategies
        once = self._ray.remote(max_calls=1, max_retries=0)(keep_rank)
        for rank in range(1, self._num_ranks):
            task = once.options(
                name=f"tokenspeed rank {rank}",
                num_cpus=self._unit["CPU"],
                num_gpus=self._unit.get("GPU", 0),
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                ),
            )
            made = task.remote(
                host=meeting.host,
                port=meeting.port,
                token=meeting.token,
                rank=rank,
                machine=self._machines[rank],
            )
            self._tasks[made] = rank

    def check(self) -> None:
        """`RankDiedError` if one has ended."""
        ended, _ = self._ray.wait(list(self._tasks), timeout=0)
        for task in ended:
            try:
                why = f"status {self._ray.get(task)}"
            except Exception as error:  # whatever kept the task from running
                why = str(error).strip().rsplit("\n", 1)[-1]
            raise RankDiedError(f"rank {self._tasks[task]}, started by Ray, ended: {why}")

    def wait(self, timeout_s: float) -> None:
        """Until all have ended; ends those that have not in time."""
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=timeout_s)
        self.kill()

    def kill(self) -> None:
        tasks, self._tasks = self._tasks, {}
        group, self._group = self._group, None
        connected, self._connected = self._connected, False
        for task in tasks:
            with contextlib.suppress(Exception):  # it has ended, or Ray has
                self._ray.cancel(task, force=True)
        if group is not None:
            with contextlib.suppress(Exception):
                self._ray.util.remove_placement_group(group)
        if connected:
            with _signals_kept():
                self._ray.shutdown()


def keep_rank(**settings: Any) -> int:
    """What Ray runs: the rank is its child, which ends with it and ends as it likes."""
    return start_worker(**settings).wait()


def import_ray() -> Any:
    """Ray. `ValueError`: it is not installed."""
    try:
        importlib.import_module("ray.util.scheduling_strategies")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(
            f'launcher ray needs Ray: pip install "tokenspeed[ray]" ({error})'
        ) from None


def connect(ray: Any) -> None:
    """To the cluster that RAY_ADDRESS names or that runs on this machine, else to a new one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nobody is called home
    address = ray_address() or ("auto" if answers(CURRENT_CLUSTER) else "local")
    if address != "local":
        try:
            ray.init(address=address, **QUIET)
        except ConnectionError as error:
            raise RankDiedError(f"no Ray cluster at {address}: {error}") from None
        return
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **QUIET,
    )


def answers(file: Path) -> bool:
    """Whether the cluster that was last started here lives; Ray would wait minutes for a dead one.

    Ray writes its address into `file` and does not remove it if the cluster is killed.
    """
    try:
        host, _, port = file.read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except (OSError, ValueError):
        return False
    return True


def check_room(has: dict[str, float], unit: dict[str, float], num_ranks: int) -> None:
    """`ValueError` if a cluster that `has` so much can never run the ranks."""
    wanted = {name: amount * num_ranks for name, amount in unit.items()}
    if any(has.get(name, 0.0) < amount for name, amount in wanted.items()):
        there = {name: has.get(name, 0.0) for name in unit}
        raise ValueError(
            f"{num_ranks} ranks ask Ray for {_amounts(wanted)}, and the cluster has"
            f" {_amounts(there)}: add machines, or make the parallel sizes smaller"
        )


def _amounts(resources: dict[str, float]) -> str:
    named = {name: resources.get(name, 0.0) for name in ("CPU", "GPU") if name in resources}
    return ", ".join(f"{amount:g} {name}" for name, amount in named.items()) or "nothing"


@contextlib.contextmanager
def _signals_kept() -> Any:
    """Ray replaces the handler of SIGTERM with its own; the engine has reasons for its."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
