# SPDX-License-Identifier: MIT
"""Which pipeline stage holds which module. Knows module paths, no ranks and no tensors.

stage 0: entry, layers [0, a)    stage 1: layers [a, b)    last: layers [b, n), exit, what follows
"""

from dataclasses import dataclass
from itertools import accumulate

from torch import nn


@dataclass(frozen=True)
class Stages:
    """`bounds` are the layers of each stage: stage s holds [bounds[s], bounds[s + 1])."""

    bounds: tuple[int, ...]
    layers: str = ""  # path of the list of layers
    entry: str = ""  # the module before it
    exit: str = ""  # the norm after it

    @property
    def count(self) -> int:
        """How many stages there are."""
        return len(self.bounds) - 1

    def stage_of(self, path: str) -> int | None:
        """The stage that holds the module at `path`; None for containers, which all have."""
        if self.count == 1:
            return 0
        if self.layers == path or self.layers.startswith(f"{path}."):
            return None
        if path.startswith(f"{self.layers}."):
            index = int(path.removeprefix(f"{self.layers}.").split(".")[0])
            return next(s for s, end in enumerate(self.bounds[1:]) if index < end)
        return 0 if path == self.entry else self.count - 1


def find_stages(model: nn.Module, count: int) -> Stages:
    """Divides the model's one list of layers. `ValueError` if there are too few."""
    found = [
        (path, flow)
        for path, module in model.named_modules()
        for flow in getattr(module, "flows", ())
        if any(isinstance(s, str) and _is_list(module, s) for s in flow)
    ]
    if len(found) != 1:
        if count > 1:
            raise ValueError(f"pipeline stages need one list of layers; the model has {len(found)}")
        return Stages((0, 0))
    path, flow = found[0]
    parent = model.get_submodule(path)
    at = next(i for i, s in enumerate(flow) if isinstance(s, str) and _is_list(parent, s))
    names = [f"{path}.{item}" if path else str(item) for item in flow]
    num_layers = sum(1 for _ in parent.get_submodule(str(flow[at])).children())
    if count > num_layers:
        raise ValueError(f"mesh axis pp: {count} stages for {num_layers} layers")
    if count > 1 and (at == 0 or at + 1 == len(flow)):
        raise ValueError(f"{path}: pipeline stages need a module before and after the layers")
    # The last stage also has the logits to compute: what is left over goes to the first ones.
    sizes = [num_layers // count + (stage < num_layers % count) for stage in range(count)]
    bounds = tuple(accumulate(sizes, initial=0))
    entry = names[at - 1] if at else ""
    return Stages(bounds, names[at], entry, names[at + 1] if at + 1 < len(flow) else "")


def _is_list(parent: nn.Module, name: str) -> bool:
    return isinstance(parent.get_submodule(name), nn.ModuleList)
