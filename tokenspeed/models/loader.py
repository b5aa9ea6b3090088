# SPDX-License-Identifier: MIT
"""Fills a rank's parameters from a checkpoint, one tensor at a time, reading only what it needs.

Everything that can be wrong with names, shapes and dtypes is found before a parameter is
allocated. The model is the only copy: a tensor is cast straight into its place. FP8 block-quantised
weights (arXiv:2412.19437, section 3.3) are dequantised on the way. Knows no mesh: each module's
`sources()` say what of a tensor its rank needs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenspeed import _cpu
from tokenspeed.errors import ModelLoadError
from tokenspeed.layers.layer import Layer, Source
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.load_report import ONE_RANK, LoadReport, Place, make_report
from tokenspeed.models.piece import Piece
from tokenspeed.models.tensor_check import (
    SCALE_SUFFIX,
    Block,
    Loadable,
    TensorNames,
    check_names,
    check_tensor,
    pick_scales,
    wanted_sources,
)


def load_weights(
    model: Loadable,
    checkpoint: Checkpoint,
    names: TensorNames,
    progress: Callable[[float], None] | None = None,
    place: Place = ONE_RANK,
) -> LoadReport:
    """Allocates and fills every parameter. `progress` gets the fraction of this rank's bytes that
    are in, about a hundred times and in the end 1.

    Raises `ModelLoadError` before it allocates anything if a tensor is missing, unknown, of the
    wrong shape or of a dtype that cannot be read, whether this rank reads it or not.
    """
    try:
        modules = wanted_sources(model, names.prefix)
        wanted = {name: s for sources in modules.values() for name, s in sources.items()}
        set_aside = check_names(model, wanted, checkpoint, names)
        for name, source in wanted.items():
            check_tensor(name, source, checkpoint, names.fp8_block)
        weights = {name: checkpoint.piece(name, source.pick) for name, source in wanted.items()}
        scales = pick_scales(weights, checkpoint, names.fp8_block)
        _allocate(model)
        packing = Packing(modules)
        before = checkpoint.num_bytes_read
        for name, tensor in _stream(checkpoint, weights, progress, shown=place.rank == 0):
            if name in scales and names.fp8_block is not None:
                scale = checkpoint.read(name + SCALE_SUFFIX, scales[name])
                tensor = dequantize(tensor, scale, names.fp8_block, model.target.dtype)
            wanted[name].write(tensor)
            packing.filled(name)
        packing.finish()
    except ModelLoadError as error:
        if place.num_ranks == 1:
            raise
        raise ModelLoadError(f"{place}: {error}") from error
    num_read = checkpoint.num_bytes_read - before
    return make_report(place, modules.values(), weights, scales, num_read, set_aside)


class Packing:
    """Packs each module's weights as soon as they are in, so that few are held twice."""

    def __init__(self, modules: Mapping[Layer, Mapping[str, Source]]) -> None:
        self._owner = {
            name: module
            for module, sources in modules.items()
            for name, source in sources.items()
            if source.pick is not None
        }
        self._left = Counter(self._owner.values())
        self._rest = [module for module in modules if not self._left[module] and module.is_here]

    def filled(self, name: str) -> None:
        """`ModelLoadError`: the module's weights cannot be quantised as asked."""
        module = self._owner[name]
        self._left[module] -= 1
        if self._left[module] == 0:
            self._pack(module, name)

    def finish(self) -> None:
        """Packs what reads other modules' weights, and makes all of them ready to run."""
        for module in self._rest:
            self._pack(module, type(module).__name__)

    def _pack(self, module: Layer, name: str) -> None:
        try:
            module.pack_weights()
        except ValueError as error:
            raise ModelLoadError(f"{name}: {error}") from error


def _stream(
    checkpoint: Checkpoint,
    weights: dict[str, Piece],
    progress: Callable[[float], None] | None,
    shown: bool,
) -> Iterator[tuple[str, Tensor]]:
    """`checkpoint.stream`, with a bar on the terminal and reports to `progress`."""
    total = sum(piece.num_bytes for piece in weights.values())
    done, told = 0, 0.0
    disable = None if shown else True  # None: where there is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading", disable=disable) as bar:
        for name, tensor in checkpoint.stream(weights):
            yield name, tensor
            done += weights[name].num_bytes
            bar.update(weights[name].num_bytes)
            if progress is not None and done < total and done / total >= told + 0.01:
                told = done / total
                progress(told)
    if progress is not None:
        progress(1.0)


def dequantize(weight: Tensor, scale: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """weight [N, K] float8, scale [ceil(N / rows), ceil(K / columns)] -> [N, K] of `dtype`.

    Works in float32 on one stripe of rows at a time.
    """
    rows, columns = block
    out = torch.empty(weight.shape, dtype=dtype)
    for i, start in enumerate(range(0, weight.shape[0], rows)):
        across = scale[i].float().repeat_interleave(columns)[: weight.shape[1]]
        out[start : start + rows] = weight[start : start + rows].float() * across
    return out


def _allocate(model: Loadable) -> None:
    """Gives every parameter of this rank memory in its local shape."""
    num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            try:
                shape, dtype = parameter.shape, parameter.dtype  # empty_like of a meta tensor
                empty = torch.empty(shape, dtype=dtype, device=model.target.device)  # loads sympy
            except (RuntimeError, MemoryError) as error:
                needs = f"the weights need {num_bytes / 2**30:.1f} GiB"
                raise ModelLoadError(f"out of memory on {model.target.device}: {needs}") from error
            if empty.device.type == "cpu":
                _cpu.prefer_huge_pages(empty)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    for module in model.modules():
        if isinstance(module, Layer):
            module.settle()
