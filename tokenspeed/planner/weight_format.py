# SPDX-License-Identifier: MIT
"""How many bytes a weight takes and in which arithmetic it is multiplied. Knows no devices.

The formats are those that checkpoints state in `quantization_config`: FP8 with a float32 scale for
each block of 128 x 128, and four bits with a 16-bit scale for each group of 32 (weights only).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from tokenspeed.layers.attention_mla import AbsorbedKv
from tokenspeed.layers.linear import Linear
from tokenspeed.layers.moe import Experts, Router
from tokenspeed.models.hf_config import HfConfig


@dataclass(frozen=True)
class WeightFormat:
    """Bytes of one element, its part of the scales included, and the arithmetic of its product.

    `block` rows x columns share a scale: ranks get whole blocks.
    """

    name: str
    bytes_per_element: float
    arithmetic: str
    block: tuple[int, int] = (1, 1)


FP32 = WeightFormat("fp32", 4.0, "fp32")
BF16 = WeightFormat("bf16", 2.0, "bf16")
FP8 = WeightFormat("fp8", 1.0 + 4.0 / 128**2, "fp8", (128, 128))
INT4 = WeightFormat("int4", 0.5 + 2.0 / 32, "bf16", (1, 32))
FP4 = WeightFormat("fp4", 0.5 + 1.0 / 16, "fp4", (1, 16))
FORMATS = {f.name: f for f in (FP32, BF16, FP8, INT4, FP4)}

FormatOf = Callable[[str, nn.Module], WeightFormat]  # module path, module -> its weights' format


def choose_formats(config: HfConfig, plain: WeightFormat, asked: str) -> FormatOf:
    """`asked` "auto": as the checkpoint of `config` stores them; else a name of `FORMATS`.

    fp8 takes every linear and expert; int4 and fp4 take the routed experts and leave the rest
    `plain`. Embedding, head, norms and routers are never quantised. `ModelLoadError` for a
    quantisation that is not known.
    """
    if asked == "auto":
        return _stored(config, plain)
    chosen = FORMATS[asked]
    if asked in ("fp32", "bf16"):
        return _kept(chosen, lambda path, module: chosen)
    if asked == "fp8":
        return _kept(plain, lambda path, module: chosen)
    return _kept(plain, lambda path, module: chosen if isinstance(module, Experts) else plain)


def _stored(config: HfConfig, plain: WeightFormat) -> FormatOf:
    section = config.section("quantization_config")
    if section is None:
        return _kept(plain, lambda path, module: plain)
    if section.word("quant_method", ("fp8", "compressed-tensors")) == "fp8":
        spared = _words(section, "modules_to_not_convert")
        return _kept(
            plain, lambda path, module: plain if _names(spared, path.split(".")[-1]) else FP8
        )
    section.word("format", ("pack-quantized",))
    for group in _groups(section):
        if group.integer("num_bits") != 4 or group.integer("group_size") != 32:
            raise group.error("num_bits", "only four bits in groups of 32 are known")
    ignored = _words(section, "ignore")

    def stored(path: str, module: nn.Module) -> WeightFormat:
        name = f"{path}.0.gate_proj" if isinstance(module, Experts) else path
        return plain if _names(ignored, name) else INT4

    return _kept(plain, stored)


def _groups(section: HfConfig) -> Iterator[HfConfig]:
    """The weights' part of each group."""
    groups = section.section("config_groups")
    if groups is None:
        raise section.error("config_groups", "is missing")
    for name in groups.values:
        group = groups.section(name)
        weights = group.section("weights") if group else None
        if weights is None:
            raise groups.error(name, "says nothing of weights")
        yield weights


def _words(section: HfConfig, key: str) -> list[str]:
    value = section.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise section.error(key, f"must be a list of names, is {value!r}")
    for word in value:
        try:
            re.compile(word.removeprefix("re:"))
        except re.error as error:
            raise section.error(key, f"{word!r} is no pattern: {error}") from error
    return value


def _names(patterns: list[str], name: str) -> bool:
    """Whether one of the patterns ("re:..." or the name itself) means the module `name`."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern.removeprefix("re:"), name):
                return True
        elif name == pattern or name.endswith("." + pattern):
            return True
    return False


def _kept(plain: WeightFormat, others: FormatOf) -> FormatOf:
    """Only products with large matrices are ever quantised; routers are kept in fp32."""

    def format_of(path: str, module: nn.Module) -> WeightFormat:
        if isinstance(module, (Linear, AbsorbedKv, Experts)):
            return others(path, module)
        return FP32 if isinstance(module, Router) else plain

    return format_of
