# SPDX-License-Identifier: MIT
"""Do the tensors of a checkpoint fit the model, and which pieces of them does this rank read?

Every rank checks every name and shape, also of tensors of which it reads nothing. Reads no data.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from tokenspeed.errors import ModelLoadError
from tokenspeed.layers.layer import Layer, Source, Target
from tokenspeed.layers.moe import Experts
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.piece import Piece
from tokenspeed.models.safetensors_header import TensorEntry

FLOATS = ("F64", "F32", "BF16", "F16")
FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
Block = tuple[int, int]


class Loadable(Protocol):
    """What loading asks of a model: see `CausalLM`."""

    target: Target

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...
    def modules(self) -> Iterable[nn.Module]: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...
    def checkpoint_name(self, name: str) -> str: ...
    def sets_aside(self, name: str) -> bool: ...


@dataclass(frozen=True)
class TensorNames:
    """Where a checkpoint keeps the language model, and how FP8 weights are cut into blocks."""

    prefix: str = ""
    other: tuple[str, ...] = ()  # prefixes of other parts of the checkpoint
    fp8_block: Block | None = None


def wanted_sources(model: Loadable, prefix: str) -> dict[Layer, dict[str, Source]]:
    """For each module the checkpoint tensors that it asks for; its picks must cover it."""
    modules: dict[Layer, dict[str, Source]] = {}
    seen: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, Layer):
            continue
        parent = path.rpartition(".")[0]
        inside = f"{parent}." if parent else ""
        sources = {prefix + model.checkpoint_name(inside + s.name): s for s in module.sources()}
        covered = sum(_num_picked(source) for source in sources.values())
        if covered != _num_to_fill(module):
            raise TypeError(f"{path}: its sources do not cover its parameters")
        if seen & sources.keys():
            raise TypeError(f"{path}: its sources are another module's")
        seen |= sources.keys()
        modules[module] = sources
    return modules


def _num_to_fill(module: Layer) -> int:
    """Elements of a module's own parameters; copies of an expert are read once."""
    count = sum(p.numel() for p in module.parameters(recurse=False))
    if isinstance(module, Experts):
        return count // len(module.held) * len(set(module.held))
    return count


def _num_picked(source: Source) -> int:
    if source.pick is None:
        return 0
    picked = zip(source.shape, source.pick, strict=True)
    return math.prod(len(range(size)[part]) for size, part in picked)


def check_names(
    model: Loadable, wanted: Mapping[str, Source], checkpoint: Checkpoint, names: TensorNames
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


def check_tensor(name: str, source: Source, checkpoint: Checkpoint, block: Block | None) -> None:
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


def pick_scales(
    weights: Mapping[str, Piece], checkpoint: Checkpoint, block: Block | None
) -> dict[str, Piece]:
    """By the name of each FP8 weight, what this rank reads of its scales."""
    if block is None:
        return {}
    return {
        name: checkpoint.piece(name + SCALE_SUFFIX, _blocks_of(name, piece, block))
        for name, piece in weights.items()
        if piece.entry.dtype == FP8
    }


def _blocks_of(name: str, piece: Piece, block: Block) -> tuple[slice, ...] | None:
    """The blocks that make up a piece. `ModelLoadError`: it cuts a block in two."""
    if not piece.num_bytes:
        return None
    sides = zip(piece.begin, piece.end, piece.entry.shape, block, strict=True)
    for what, (begin, end, size, step) in zip(("rows", "columns"), sides, strict=True):
        if begin % step or (end % step and end != size):
            raise ModelLoadError(
                f"{name}: {what} {begin} to {end} of {size}, divided over {size // (end - begin)} "
                f"ranks, are not whole FP8 blocks of {step}; use fewer ranks"
            )
    starts = zip(piece.begin, piece.end, block, strict=True)
    return tuple(slice(begin // step, -(-end // step)) for begin, end, step in starts)
