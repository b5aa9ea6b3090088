# SPDX-License-Identifier: MIT
"""What tensors travel over between ranks: shared memory on one machine, else torch.distributed."""

import secrets
from typing import Any

import torch

from tokenspeed.engine.ranks.meeting import free_port
from tokenspeed.spmd.group import Communicator

TIMEOUT_S = 300.0  # of a call in which a rank that lives does not answer


def choose_wires(
    num_ranks: int, device: torch.device, hosts: set[str], host: str
) -> dict[str, Any]:
    """For the welcome; `host` is where rank 0 can be reached."""
    if device.type == "cpu" and len(hosts) == 1:
        name = f"tokenspeed-{secrets.token_hex(6)}"
        return {"kind": "shm", "address": name, "num_ranks": num_ranks, "device": device.type}
    address = f"tcp://{host}:{free_port(host)}"
    return {"kind": "torch", "address": address, "num_ranks": num_ranks, "device": device.type}


def make_communicator(rank: int, wires: dict[str, Any], local_rank: int = 0) -> Communicator:
    """Meets the other ranks there. `RankDiedError`: one did not come."""
    if wires["kind"] == "shm":
        from tokenspeed.spmd.shm_group import shm_communicator

        return shm_communicator(rank, wires["num_ranks"], wires["address"], TIMEOUT_S)
    from tokenspeed.spmd.torch_group import torch_communicator

    device = torch.device("cuda", local_rank) if wires["device"] == "cuda" else torch.device("cpu")
    return torch_communicator(rank, wires["num_ranks"], wires["address"], device, TIMEOUT_S)
