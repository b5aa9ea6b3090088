# SPDX-License-Identifier: MIT
"""Data parallelism over processes of one thread each, joined once per step.

On a busy machine this beats threads: they meet at every operation, and wait there for the slower.
Started by `torchrun`; without it there is one worker. Refuses to know what the tensors mean.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def average(tensors: list[Tensor]) -> None:
    """Replaces every tensor by its mean over the workers, so that all hold the same values."""
    if not dist.is_initialized():
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= count()
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
