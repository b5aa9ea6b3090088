# SPDX-License-Identifier: MIT
"""Reads a Hugging Face `config.json` as an untrusted form: every value typed, every refusal named.

Refuses to know architectures; keys that only one of them has are read in that model's file.
Code named by `auto_map` is never executed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.errors import ModelLoadError

MAX_JSON_BYTES = 64 << 20
MAX_INTEGER = 2**24  # of any size: far beyond real models, small enough to multiply


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. `ModelLoadError`: missing, too large, not JSON, not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelLoadError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must be a JSON object, is {type(value).__name__}")
    return value


class _Required:
    pass


REQUIRED = _Required()


@dataclass(frozen=True)
class HfConfig:
    """Typed access to a configuration's keys; `where` stands in front of a key in messages.

    A key that is absent or null takes the default; without a default it must be there.
    """

    values: Mapping[str, Any]
    where: str = "config.json"

    def error(self, key: str, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self.where}: {key}: {why}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(
        self,
        key: str,
        default: int | _Required = REQUIRED,
        *,
        minimum: int = 1,
        maximum: int = MAX_INTEGER,
    ) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, is {value!r}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"must be in [{minimum}, {maximum}], is {value}")
        return value

    def number(
        self, key: str, default: float | _Required = REQUIRED, *, above: float = 0.0
    ) -> float:
        """A finite number greater than `above`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"must be a number, is {value!r}")
        if not math.isfinite(value) or value <= above:
            raise self.error(key, f"must be a finite number above {above}, is {value}")
        return float(value)

    def boolean(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, is {value!r}")
        return value

    def word(self, key: str, allowed: tuple[str, ...], default: str | _Required = REQUIRED) -> str:
        value = self._get(key, default)
        if value not in allowed:
            raise self.error(key, f"{value!r} is not supported; supported: {', '.join(allowed)}")
        return str(value)

    def integers(self, key: str) -> list[int]:
        """A list of non-negative integers; one integer is a list of one; absent is empty."""
        value = self.values.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise self.error(key, f"must hold non-negative integers, holds {item!r}")
        return items

    def section(self, key: str) -> "HfConfig | None":
        """A nested object, or None if the key is absent, null or empty."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, is {type(value).__name__}")
        return HfConfig(value, f"{self.where}: {key}") if value else None

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise self.error(key, "is missing")
        return default


def text_config(config: HfConfig) -> HfConfig:
    """The language model's part of a configuration: nested in multimodal ones, else itself."""
    return config.section("text_config") or config


def architecture(config: HfConfig) -> str:
    """The one name in `architectures`."""
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.error("architectures", f"must be a list of one name, is {names!r}")
    return names[0]


def eos_token_ids(folder: Path) -> list[int]:
    """End-of-sequence ids: those of generation_config.json if it names any, else config.json's."""
    generation = folder / "generation_config.json"
    if generation.exists():
        ids = HfConfig(read_json(generation), generation.name).integers("eos_token_id")
        if ids:
            return ids
    config = HfConfig(read_json(folder / "config.json"))
    return config.integers("eos_token_id") or text_config(config).integers("eos_token_id")
