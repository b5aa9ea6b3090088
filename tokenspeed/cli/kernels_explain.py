# SPDX-License-Identifier: MIT
"""What `tokenspeed kernels list` and `explain` print: backends, the choice, and every reason.

A model is built on the meta device and asked which kernels its layers would ask for.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from tokenspeed.cli.kernels import LAYERS_OF_EACH_KIND
from tokenspeed.kernels.backend import Ask, Verdict
from tokenspeed.kernels.device import arch_of, device_of_arch
from tokenspeed.kernels.registry import REGISTRY, record_asks

SAMPLING = ("sample", "apply_penalties", "logprobs")
if TYPE_CHECKING:
    from tokenspeed.models.causal_lm import CausalLM

Asked = list[tuple[str, Ask]]  # where in the model, and what it asks for


def list_ops(args: argparse.Namespace) -> int:
    REGISTRY.load()
    for name, op in sorted(REGISTRY.ops.items()):
        print(f"{name:<16} {', '.join(sorted(REGISTRY.backends[name]))}\n    {op.call}")
    REGISTRY.tables.times("", "cpu", arch_of("cpu"), "", {})
    _print_left_out()
    return 0


def explain(args: argparse.Namespace) -> int:
    if (args.op is None) is (args.model is None):
        raise ValueError("explain: give an op, or --model NAME")
    if args.model is not None and (args.dtype or args.shape):
        raise ValueError("explain: --dtype and --shape are for an op; a model has its own")
    arch = args.arch or arch_of(args.device or "cpu")
    device = _device(args.device or device_of_arch(arch))
    if args.op is not None:
        dtype = getattr(torch, args.dtype or "bfloat16")
        _print(REGISTRY.explain(Ask(args.op, device, dtype, dict(args.shape), arch)))
    else:
        for title, asked in model_asks(args.model, args.layer, args.tp):
            print(title)
            for place, ask in asked:
                here = replace(ask, device=device, arch=arch)
                print(f"  {place}: {here}")
                _print(REGISTRY.explain(here), indent="    ")
    _print_left_out()
    return 0


def _device(name: str) -> str:
    try:
        return torch.device(name).type
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; known: cpu, cuda ...") from None


def _print(verdicts: Sequence[Verdict], indent: str = "") -> None:
    for verdict in verdicts:
        mark = "*" if verdict.chosen else " "
        print(f"{indent}{mark} {verdict.backend:<12} {verdict.reason}")


def _print_left_out() -> None:
    for source, package in REGISTRY.sources.missing.items():
        print(f"not installed: {source} needs {package}")
    for source, problem in REGISTRY.problems.items():
        print(f"not loaded: {source}: {problem}")
    for path, why in REGISTRY.tables.ignored.items():
        print(f"table ignored: {path}: {why}")


def model_asks(
    name: str, layer: int | None = None, num_ranks: int = 1
) -> Iterator[tuple[str, Asked]]:
    """(title, what is asked for) of each part of a model on one of `num_ranks` devices.

    `layer` None: the whole model; a number: that decoder layer; `LAYERS_OF_EACH_KIND`: one of each.
    Layers that ask for the same are one part.
    """
    model = _build(name, num_ranks)
    parts: list[tuple[list[int], Asked]] = []
    for index, each in enumerate(model.model.layers):
        asked = _asks_of(each)
        same = next((indices for indices, other in parts if other == asked), None)
        if same is None:
            parts.append(([index], asked))
        else:
            same.append(index)
    if layer is not None and not LAYERS_OF_EACH_KIND <= layer < len(model.model.layers):
        raise ValueError(f"--layer {layer}: {name} has layers 0 to {len(model.model.layers) - 1}")
    if layer is None:
        yield "before the layers", _asks_of(model.model.embed_tokens, "model.embed_tokens")
    for indices, asked in parts:
        if layer in (None, LAYERS_OF_EACH_KIND) or layer in indices:
            yield _title(indices), asked
    if layer is None:
        tail = _asks_of(model.model.norm, "model.norm") + _asks_of(model.lm_head, "lm_head")
        sampling = [(op, Ask(op, "meta", torch.float32, {})) for op in SAMPLING]
        yield "after the layers", tail + sampling


def _title(indices: list[int]) -> str:
    if len(indices) == 1:
        return f"layer {indices[0]}"
    whole = indices == list(range(indices[0], indices[-1] + 1))
    spans = f"{indices[0]} to {indices[-1]}" if whole else ", ".join(map(str, indices))
    return f"layers {spans}"


def _asks_of(root: nn.Module, path: str = "") -> Asked:
    """What the modules under `root` ask for when they choose their kernels."""
    asked: Asked = []
    for name, module in root.named_modules(prefix=path):
        choose = getattr(module, "choose_kernels", None)
        if choose is not None:
            with record_asks() as asks:
                choose()
            asked += [(name, ask) for ask in asks]
    return asked


def _build(name: str, num_ranks: int) -> "CausalLM":
    """The model with the local shapes of rank 0; experts are divided too."""
    from tokenspeed.planner.catalog import open_model
    from tokenspeed.spmd.compile import compile_model
    from tokenspeed.spmd.expert_placement import ExpertPlacement
    from tokenspeed.spmd.localise import cut_parameters
    from tokenspeed.spmd.mesh import Mesh

    planned = open_model(name)
    model = planned.model
    plan = compile_model(model, Mesh(tp=num_ranks, ep=num_ranks if planned.has_experts else 1))
    held = {
        path: ExpertPlacement.default(plan.whole_shapes[f"{path}.w2"][0], plan.mesh.ep)
        for path in plan.experts
    }
    cut_parameters(model, plan, 0, held)
    return model
