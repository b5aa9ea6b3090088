# SPDX-License-Identifier: MIT
"""What tensors travel over between ranks: shared memory on one machine, else torch.distributed."""

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.config import Communication
from tokenspeed.engine.ranks.meeting import free_port

if TYPE_CHECKING:  # torch starts threads: a worker imports it once it has its share of the cores
    import torch

    from tokenspeed.spmd.group import Communicator

TIMEOUT_S = 300.0  # of a call in which a rank that lives does not answer
SHARED_MEMORY = Path("/dev/shm")


def can_share_memory() -> bool:
    """Whether processes of this machine can exchange tensors and steps in shared memory."""
    from torch import Tensor

    return os.access(SHARED_MEMORY, os.W_OK) and hasattr(Tensor, "__dlpack_c_exchange_api__")


def check_wires(device: "torch.device", asked: Communication) -> None:
    """Before anything is started. `ValueError`: this device's tensors cannot travel so."""
    if asked not in {"cpu": ("auto", "shm", "gloo"), "cuda": ("auto", "nccl")}[device.type]:
        raise ValueError(f"communication: {asked} does not carry tensors of {device.type}")


def choose_wires(
    num_ranks: int, device: "torch.device", hosts: set[str], host: str, asked: Communication
) -> dict[str, Any]:
    """For the welcome; `host` is where rank 0 can be reached.

    `ValueError`: what was asked for does not reach all ranks.
    """
    shared = device.type == "cpu" and len(hosts) == 1 and can_share_memory()
    network = "gloo" if device.type == "cpu" else "nccl"
    if asked not in ("auto", network) and not (asked == "shm" and shared):
        raise ValueError(
            f"communication: {asked} does not connect {num_ranks} ranks on {device.type} of "
            f"{len(hosts)} machine(s); use auto"
        )
    if shared and asked != network:
        return {"kind": "shm", "address": new_name(), "num_ranks": num_ranks, "device": device.type}
    bracketed = f"[{host}]" if ":" in host else host
    address = f"tcp://{bracketed}:{free_port(host)}"
    return {"kind": "torch", "address": address, "num_ranks": num_ranks, "device": device.type}


def new_name() -> str:
    """Of something in shared memory: whose it is, and what nobody else will think of."""
    return f"{name_prefix()}{secrets.token_hex(6)}"


def name_prefix() -> str:
    """Of whatever this process names."""
    return f"tokenspeed-{os.getpid()}-"


def clear_away(*prefixes: str | None) -> None:
    """Removes names of shared memory that ranks which died had no time to remove."""
    for prefix in prefixes:
        for path in SHARED_MEMORY.glob(f"{prefix}*") if prefix else ():
            with contextlib.suppress(OSError):
                path.unlink()


def make_communicator(rank: int, wires: dict[str, Any], local_rank: int = 0) -> "Communicator":
    """Meets the other ranks there. `RankDiedError`: one did not come."""
    if wires["kind"] == "shm":
        from tokenspeed.spmd.shm_group import shm_communicator

        return shm_communicator(rank, wires["num_ranks"], wires["address"], TIMEOUT_S)
    import torch

    from tokenspeed.spmd.torch_group import torch_communicator

    device = torch.device("cuda", local_rank) if wires["device"] == "cuda" else torch.device("cpu")
    return torch_communicator(rank, wires["num_ranks"], wires["address"], device, TIMEOUT_S)
