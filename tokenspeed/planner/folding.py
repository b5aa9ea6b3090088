# SPDX-License-Identifier: MIT
"""A model with one layer of each kind in place of all of them, and which layer each stands for.

A compile then takes milliseconds, and a search can afford many. Layers are of one kind if they are
built alike, their weights are held alike, and the layers before them are of one kind: what comes
in decides the collectives. Knows no meshes.
"""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import nn

from tokenspeed.models.causal_lm import CausalLM

LAYERS = "model.layers"


@dataclass(frozen=True)
class FoldedModel:
    """`model` has the layers `kept` of the whole one; `stands_for[i]` is layer i's place in it."""

    model: CausalLM
    kept: tuple[int, ...]
    stands_for: tuple[int, ...]

    def layer_of(self, path: str) -> int | None:
        """The place of the layer that a path leads into, None outside the layers."""
        rest = path.removeprefix(LAYERS + ".")
        return None if rest == path else int(rest.split(".")[0])

    def whole_path(self, path: str) -> str:
        """A module's path in the whole model."""
        place = self.layer_of(path)
        if place is None:
            return path
        rest = path.removeprefix(f"{LAYERS}.{place}")
        return f"{LAYERS}.{self.kept[place]}{rest}"

    def text(self, path: str) -> str:
        """A path for people: `*` for the number of the layer."""
        place = self.layer_of(path)
        return path if place is None else path.replace(f"{LAYERS}.{place}", f"{LAYERS}.*", 1)


def fold_layers(model: CausalLM, held: Callable[[str, nn.Module], Hashable]) -> FoldedModel:
    """`held` tells how a module's weights are held, by its path and itself."""
    layers = list(model.model.layers)
    kinds = [_kind(layer, f"{LAYERS}.{i}", held) for i, layer in enumerate(layers)]
    kept: list[int] = []
    place_of: dict[tuple[Hashable, Hashable], int] = {}
    stands_for: list[int] = []
    for index, kind in enumerate(kinds):
        pair = (kinds[index - 1] if index else None, kind)
        last = index == len(kinds) - 1
        if pair not in place_of or (last and kinds[kept[-1]] != kind):
            if kept and kinds[kept[-1]] != kinds[index - 1]:
                stands_for[index - 1] = len(kept)
                kept.append(index - 1)
            place_of[pair] = len(kept)
            kept.append(index)
        stands_for.append(place_of[pair])
    return FoldedModel(_with_layers(model, kept), tuple(kept), tuple(stands_for))


def _kind(layer: nn.Module, path: str, held: Callable[[str, nn.Module], Hashable]) -> Hashable:
    return tuple(
        (
            name,
            type(module),
            repr(getattr(module, "spec", None)),
            held(f"{path}.{name}" if name else path, module),
            tuple((n, p.shape, p.dtype) for n, p in module.named_parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


def _with_layers(model: CausalLM, kept: list[int]) -> CausalLM:
    """A copy that shares everything but the list of layers."""
    thin, decoder = copy.copy(model), copy.copy(model.model)
    layers = nn.ModuleList(model.model.layers[index] for index in kept)
    decoder.__dict__["_modules"] = {**model.model._modules, "layers": layers}
    thin.__dict__["_modules"] = {**model._modules, "model": decoder}
    return thin
