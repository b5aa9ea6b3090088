# SPDX-License-Identifier: MIT
"""Rotary position embeddings: frequencies of every supported scaling, and their shared table.

Knows nothing of the configuration file's spelling; `models/decoder_config.py` reads that.
Sources: RoFormer (arXiv:2104.09864), YaRN (arXiv:2309.00071), Llama 3.1 and DeepSeek-V2 releases.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """One model's rotary embedding. Fields after `theta` are read by some types only."""

    dim: int  # rotated features per head, even
    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: positions before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: given outright instead of by mscale
    mscale: float = 0.0  # yarn, DeepSeek's rule
    mscale_all_dim: float = 0.0  # yarn, DeepSeek's rule
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def table_scale(self) -> float:
        """What multiplies cos and sin (YaRN's attention factor)."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor, 1.0)

    def softmax_scale(self) -> float:
        """What multiplies the softmax scale in DeepSeek's attention: mscale(mscale_all_dim)^2."""
        if self.type == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction of magnitudes for a context `factor` times longer. arXiv:2309.00071."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rope_table(config: RopeConfig, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, dim] float32: each row cos of dim / 2 angles, then sin of the same."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * config.table_scale()
    return table.to(device)


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """[dim / 2] float32 radians per position."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    base = 1.0 / (config.theta**exponents)
    if config.type == "linear":
        return base / config.factor
    if config.type == "llama3":
        return _llama3(config, base)
    if config.type == "yarn":
        return _yarn(config, base)
    return base


def _llama3(config: RopeConfig, base: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    turns = config.original_max_position * base / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    keep = ((turns - config.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - keep) * base / config.factor + keep * base


def _yarn(config: RopeConfig, base: Tensor) -> Tensor:
    """Dimensions that turn often are kept, slow ones are stretched, with a linear ramp between."""

    def dimension_of(turns: float) -> float:
        ratio = config.original_max_position / (turns * 2 * math.pi)
        return config.dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step
    ramp = (torch.arange(config.dim // 2, dtype=torch.float32) - low) / (high - low)
    stretched = ramp.clamp(0.0, 1.0)
    return base / config.factor * stretched + base * (1 - stretched)
