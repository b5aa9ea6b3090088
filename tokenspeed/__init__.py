# SPDX-License-Identifier: MIT
"""TokenSpeed, an inference engine for coding agents: the public names, loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenspeed.config import EngineConfig
    from tokenspeed.execution.sampling_params import SamplingParams
    from tokenspeed.llm import LLM

__all__ = ["EngineConfig", "LLM", "SamplingParams"]  # noqa: RUF022 - in plain order
__version__ = "0.1.0"

_HOMES = {
    "EngineConfig": "tokenspeed.config",
    "LLM": "tokenspeed.llm",
    "SamplingParams": "tokenspeed.execution.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenspeed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
