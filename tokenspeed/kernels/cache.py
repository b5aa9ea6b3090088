# SPDX-License-Identifier: MIT
"""Pages between caches: signature and torch reference. Knows neither what a page holds nor why."""

from torch import Tensor

from tokenspeed.kernels.registry import define


def copy_pages(source: Tensor, target: Tensor, sources: Tensor, targets: Tensor) -> None:
    """target[targets[i]] = source[sources[i]], in place; pages are the first dimension.

    source [P, ...] and target [Q, ...] have the same dtype and page shape, and may be on different
    devices, or the same tensor; then no page is both read and written. sources, targets: int64 [n],
    no page twice among the targets.
    """
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
        raise ValueError(
            f"copy_pages: pages of source {tuple(source.shape[1:])} {source.dtype} are not like "
            f"those of target, {tuple(target.shape[1:])} {target.dtype}"
        )
    if sources.dim() != 1 or sources.shape != targets.shape:
        raise ValueError(
            f"copy_pages: sources {tuple(sources.shape)} and targets {tuple(targets.shape)} differ"
        )
    read = source[sources.to(source.device)]
    target[targets.to(target.device)] = read.to(target.device)


define(
    "copy_pages",
    "(source[P,...], target[Q,...], sources[n] int64 >= 0, targets[n] int64 >= 0) -> None, in "
    "place; source and target may be on any device",
    copy_pages,
)
