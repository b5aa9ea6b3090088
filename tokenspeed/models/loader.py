# SPDX-License-Identifier: MIT
"""Fills a model's parameters from a checkpoint, one tensor at a time.

Everything that can be wrong with names, shapes and dtypes is found before a parameter is
allocated. The model is the only copy: a tensor is cast straight into its place. FP8 block-quantised
weights (arXiv:2412.19437, section 3.3) are dequantised on the way.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenspeed.errors import ModelLoadError
from tokenspeed.layers.layer import Layer, Source
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.safetensors_header import TensorEntry
from tokenspeed.spmd.compile import SpmdPlan

FLOATS = ("F64", "F32", "BF16", "F16")
FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
Block = tuple[int, int]


@dataclass(frozen=True)
class LoadReport:
    """What one load did."""

    num_tensors: int
    num_bytes: int  # read from the checkpoint into the model
    set_aside: tuple[str, ...]  # known tensors that this model does not use


@dataclass(frozen=True)
class TensorNames:
    """Where a checkpoint keeps the language model, and how FP8 weights are cut into blocks."""

    prefix: str = ""
    other: tuple[str, ...] = ()  # prefixes of other parts of the checkpoint
    fp8_block: Block | None = None


def load_weights(
    model: CausalLM,
    plan: SpmdPlan,
    checkpoint: Checkpoint,
    names: TensorNames,
    progress: Callable[[float], None] | None = None,
) -> LoadReport:
    """Allocates and fills every parameter. `progress` gets the fraction of bytes that are in,
    about a hundred times and in the end 1.

    Raises `ModelLoadError` before it allocates anything if a tensor is missing, unknown, of the
    wrong shape or of a dtype that cannot be read.
    """
    wanted = _wanted(model, names.prefix)
    set_aside = _check_names(model, wanted, checkpoint, names)
    for name, source in wanted.items():
        _check_tensor(name, source, checkpoint, names.fp8_block)
    _allocate(model, plan)
    total = sum(checkpoint.entries[n].end - checkpoint.entries[n].begin for n in wanted)
    done, told = 0, 0.0
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading", disable=None) as bar:
        for name, tensor in checkpoint.stream(set(wanted)):
            if tensor.dtype == torch.float8_e4m3fn and names.fp8_block is not None:
                scale = checkpoint.read(name + SCALE_SUFFIX)
                tensor = dequantize(tensor, scale, names.fp8_block, model.target.dtype)
            wanted[name].write(tensor)
            size = checkpoint.entries[name].end - checkpoint.entries[name].begin
            done += size
            bar.update(size)
            if progress is not None and (done == total or done / total >= told + 0.01):
                told = done / total
                progress(told)
    return LoadReport(len(wanted), total, set_aside)


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


def _wanted(model: CausalLM, prefix: str) -> dict[str, Source]:
    """Every checkpoint tensor that the model asks for. A module's sources must cover it."""
    wanted: dict[str, Source] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Layer):
            continue
        parent = path.rpartition(".")[0]
        sources = {prefix + (f"{parent}." if parent else "") + s.name: s for s in module.sources()}
        covered = sum(math.prod(source.shape) for source in sources.values())
        if covered != sum(p.numel() for p in module.parameters(recurse=False)):
            raise TypeError(f"{path}: its sources do not cover its parameters")
        if wanted.keys() & sources.keys():
            raise TypeError(f"{path}: its sources are another module's")
        wanted.update(sources)
    return wanted


def _check_names(
    model: CausalLM, wanted: dict[str, Source], checkpoint: Checkpoint, names: TensorNames
) -> tuple[str, ...]:
    """Refuses missing and unknown tensors; returns those that are set aside."""
    there = checkpoint.entries.keys()
    if missing := wanted.keys() - there:
        raise ModelLoadError(f"{checkpoint.folder}: lacks {_some(missing)}")
    scales = {name + SCALE_SUFFIX for name in wanted if checkpoint.entries[name].dtype == FP8}
    rest = there - wanted.keys() - scales
    aside = {
        name
        for name in rest
        if name.startswith(names.other)
        or (name.startswith(names.prefix) and model.sets_aside(name.removeprefix(names.prefix)))
    }
    if unknown := rest - aside:
        raise ModelLoadError(f"{checkpoint.folder}: the model has no place for {_some(unknown)}")
    return tuple(sorted(aside))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return f"{len(ordered)} tensor(s): {', '.join(ordered[:5])}{more}"


def _check_tensor(name: str, source: Source, checkpoint: Checkpoint, block: Block | None) -> None:
    entry = checkpoint.entries[name]
    if entry.shape != source.shape:
        raise ModelLoadError(f"{name}: shape {entry.shape} where config.json needs {source.shape}")
    if entry.dtype in FLOATS:
        return
    if entry.dtype != FP8:
        raise ModelLoadError(f"{name}: weights of dtype {entry.dtype} are not supported")
    scale: TensorEntry | None = checkpoint.entries.get(name + SCALE_SUFFIX)
    if block is None or scale is None or len(source.shape) != 2:
        raise ModelLoadError(
            f"{name}: an FP8 weight needs quantization_config.weight_block_size in config.json "
            f"and the tensor {name + SCALE_SUFFIX}"
        )
    needed = tuple(-(-size // step) for size, step in zip(entry.shape, block, strict=True))
    if scale.shape != needed or scale.dtype not in FLOATS:
        raise ModelLoadError(
            f"{name}{SCALE_SUFFIX}: {scale.dtype} of shape {scale.shape}, must be {needed}"
        )


def _allocate(model: CausalLM, plan: SpmdPlan) -> None:
    num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    for path, shape in plan.shapes.items():
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        dtype = module.get_parameter(name).dtype
        try:
            empty = torch.empty(shape, dtype=dtype, device=model.target.device)
        except (RuntimeError, MemoryError) as error:
            needs = f"the weights need {num_bytes / 2**30:.1f} GiB"
            raise ModelLoadError(f"out of memory on {model.target.device}: {needs}") from error
        setattr(module, name, nn.Parameter(empty, requires_grad=False))
    for module in model.modules():
        if isinstance(module, Layer):
            module.settle()
