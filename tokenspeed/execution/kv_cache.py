# SPDX-License-Identifier: MIT
"""The paged KV cache: how many pages there are, and their tensors. Knows shapes, no owners."""

import os
from collections.abc import Callable, Sequence

import torch

from tokenspeed import _cpu
from tokenspeed.config import CacheOptions
from tokenspeed.layers.cache_spec import CacheSpec

CPU = torch.device("cpu")
Make = Callable[..., torch.Tensor]
# Of what the device can still give, when no option says how much. A CPU has other things to do.
FREE_MEMORY_SHARE = {"cpu": 0.3, "cuda": 0.85}


class KVCache:
    """One tuple of tensors per layer, each [num_pages, page_size, *shape]; contents undefined.

    On a CPU the rows of a head lie one after the other in a page: a core reads a few long stretches
    of memory faster than many short ones.

    `draft_layers` are those of a drafter, in the same pages and `num_draft_pages` behind them; they
    are zero at first, as a drafter may skip tokens.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        draft_specs: Sequence[CacheSpec] = (),
        num_draft_pages: int = 0,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.layers = [self._tensors(spec, num_pages, torch.empty, device) for spec in specs]
        count = num_pages + num_draft_pages
        self.draft_layers = [self._tensors(s, count, torch.zeros, device) for s in draft_specs]

    def _tensors(
        self, spec: CacheSpec, num_pages: int, make: Make, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            _pages((num_pages, self.page_size, *shape), spec.dtype, make, device)
            for shape in spec.shapes
        )

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies whole pages of every layer; both [n] int64."""
        for tensors in (*self.layers, *self.draft_layers):
            for tensor in tensors:
                tensor[targets] = tensor[sources]


def _pages(
    size: tuple[int, ...], dtype: torch.dtype, make: Make, device: torch.device
) -> torch.Tensor:
    """[num_pages, page_size, ...]"""
    if device.type != "cpu":
        return make(size, dtype=dtype, device=device)
    num_pages, page_size, *heads, features = size
    pages = make((num_pages, *heads, page_size, features), dtype=dtype)
    _cpu.prefer_huge_pages(pages)
    return pages.transpose(1, 2) if heads else pages


def page_bytes(specs: Sequence[CacheSpec], page_size: int) -> int:
    """Bytes of one page over all layers."""
    return page_size * sum(spec.bytes_per_token() for spec in specs)


def choose_num_pages(
    options: CacheOptions,
    specs: Sequence[CacheSpec],
    *,
    max_model_len: int,
    max_num_seqs: int,
    num_sharers: int = 1,
    device: torch.device = CPU,
) -> int:
    """`num_pages`, or as many as `kv_cache_memory_bytes` or a share of the free memory holds.

    Left to itself it never takes more than every slot at its full length could use twice over:
    once running, once remembered. `num_sharers` processes make such a cache on this machine, each
    for itself; a GPU is nobody else's. `ValueError` if there is not as much memory as was asked.
    """
    one_page, free = page_bytes(specs, options.page_size), free_memory(device)
    if device.type == "cpu":
        free //= num_sharers
    asked = options.num_pages
    if asked is None and options.kv_cache_memory_bytes is not None:
        asked = options.kv_cache_memory_bytes // one_page
    if asked is None:
        most = 2 * max_num_seqs * pages_of(max_model_len, options.page_size)
        return min(most, int(free * FREE_MEMORY_SHARE[device.type]) // one_page)
    if asked * one_page > free:
        raise ValueError(
            f"a KV cache of {asked} pages takes {asked * one_page} bytes, and {free} are free"
            f"{f' for each of {num_sharers} engines' if num_sharers > 1 else ''}: "
            "lower num_pages or kv_cache_memory_bytes"
        )
    return asked


def fit_max_model_len(asked: int | None, longest: int, num_pages: int, page_size: int) -> int:
    """The context length to serve: what was asked, or what model and cache allow.

    `ValueError` if one request of the length that was asked for does not fit into the cache.
    """
    room = num_pages * page_size
    if asked is None and room > 0:
        return min(longest, room)
    if room < (asked or 1):
        raise ValueError(
            f"the KV cache holds {room} tokens ({num_pages} pages of {page_size}), too few for one "
            f"request of max_model_len {asked or longest}: lower max_model_len, or raise num_pages "
            "or kv_cache_memory_bytes"
        )
    return asked or longest


def pages_of(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens occupy."""
    return -(-num_tokens // page_size)


def free_memory(device: torch.device = CPU) -> int:
    """Bytes that the device could still give; half of what a machine has if it does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
