# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Copies of pages in Triton: one launch for all pages of a step. Knows no page's contents.

A page is words of the widest size that divides it. One of the caches may be pinned memory of the
host, which a GPU reads and writes in place; the lists of pages are on the GPU.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.triton_launch import (
    WIDE_TYPES,
    pdl_options,
    pdl_release,
    pdl_wait,
    register_triton,
    specimen_pdl,
)
from tokenspeed.kernels.triton_targets import Specimen

_BLOCK = 1024
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _copy_pages(source, target, sources, targets, words, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """source[P, words], target[Q, words]; program (copy, block of words)."""
    copy = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < words
    pdl_wait(PDL)
    read = source + tl.load(sources + copy).to(tl.int64) * words
    written = target + tl.load(targets + copy).to(tl.int64) * words
    value = tl.load(read + at, mask=mask, other=0)
    pdl_release(PDL)
    tl.store(written + at, value, mask=mask)


def _words(pages: Tensor, name: str) -> Tensor:
    """[P, words] of the same memory."""
    if not pages.is_contiguous():
        raise ValueError(f"copy_pages: {name} {tuple(pages.shape)} is not contiguous")
    flat = pages.view(pages.shape[0], -1)
    size = flat.shape[1] * flat.element_size()
    aligned = pages.data_ptr() | size
    word = next(w for w in _WORDS if aligned % w.itemsize == 0)
    return flat.view(word)


def copy_pages(source: Tensor, target: Tensor, sources: Tensor, targets: Tensor) -> None:
    """target[targets[i]] = source[sources[i]], in place; see the reference."""
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
        raise ValueError(f"copy_pages: source {tuple(source.shape)}, target {tuple(target.shape)}")
    for name, pages in (("sources", sources), ("targets", targets)):
        if pages.dim() != 1 or pages.dtype != torch.int64 or not pages.is_contiguous():
            raise ValueError(f"copy_pages: {name} {tuple(pages.shape)} {pages.dtype} is not int64")
    if sources.shape != targets.shape or sources.device != targets.device:
        raise ValueError("copy_pages: sources and targets differ in length or device")
    for name, cache in (("source", source), ("target", target)):
        if cache.device != sources.device and not cache.is_pinned():
            raise ValueError(f"copy_pages: {name} is on {cache.device} and not pinned")
    if sources.numel() == 0 or source[:1].numel() == 0:
        return
    read, written = _words(source, "source"), _words(target, "target")
    if read.dtype != written.dtype:
        read, written = (t.view(torch.uint8) for t in (read, written))
    words = read.shape[1]
    _copy_pages[(sources.numel(), triton.cdiv(words, _BLOCK))](
        *(read, written, sources, targets, words), BLOCK=_BLOCK, **pdl_options(sources)
    )


def specimens(arch: str) -> Iterator[Specimen]:
    """Words of 8 bytes."""
    constants, options = specimen_pdl(arch)
    yield Specimen(
        "copy_pages",
        _copy_pages,
        {**dict.fromkeys(("source", "target", "sources", "targets"), "*i64"), "words": "i32:16"},
        {"BLOCK": _BLOCK, **constants},
        options=options,
        quick=True,
    )


register_triton("copy_pages", copy_pages, (*WIDE_TYPES, torch.uint8))
