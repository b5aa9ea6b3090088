# SPDX-License-Identifier: MIT
"""All options of an engine: frozen, composed, resolved once. Reads no file and no device.

Groups say what an option can change: `ModelOptions` and `CacheOptions.dtype` change answers, the
others change only speed, memory and reachability. The CLI reads its defaults from here.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

DType = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how its numbers are held. These options change behaviour."""

    model: str = "demo"
    tokenizer: str | None = None
    revision: str | None = None
    served_model_name: tuple[str, ...] = ()
    dtype: DType = "auto"
    device: Device = "auto"
    max_model_len: int | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    seed: int = 0
    max_logprobs: int = 20


@dataclass(frozen=True)
class CacheOptions:
    """The paged KV cache. `dtype` changes behaviour, the rest performance."""

    kv_cache_dtype: DType = "auto"
    page_size: int = 64
    num_pages: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True


@dataclass(frozen=True)
class SchedulerOptions:
    """How steps are filled. These options change performance, never tokens."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_num_partial_prefills: int = 4
    overlap_depth: int = 0
    max_queue_len: int = 1024


@dataclass(frozen=True)
class ParallelOptions:
    """How many devices share the model."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs, in groups. Build it with `EngineConfig.of(**flat_options)`."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    @classmethod
    def of(cls, **options: Any) -> "EngineConfig":
        """Builds a config from flat option names; unknown names raise `ValueError`."""
        groups: dict[str, Any] = {}
        for group in dataclasses.fields(cls):
            kind = group.default_factory
            assert isinstance(kind, type)
            names = {f.name for f in dataclasses.fields(kind)}
            groups[group.name] = kind(**{n: options.pop(n) for n in names & options.keys()})
        if options:
            raise ValueError(f"unknown option {', '.join(sorted(options))}")
        return cls(**groups)

    def __post_init__(self) -> None:
        _check(self)


def _check(config: EngineConfig) -> None:
    """Refuses impossible values and combinations before anything is allocated."""
    for group in dataclasses.fields(config):
        for option in dataclasses.fields(getattr(config, group.name)):
            value = getattr(getattr(config, group.name), option.name)
            if option.type in (DType, Device) and value not in get_args(option.type):
                raise ValueError(f"{option.name} must be one of {get_args(option.type)}: {value!r}")
            if option.name.startswith(("max_", "num_", "page_", "kv_cache_memory")) and (
                isinstance(value, bool) or (isinstance(value, int) and value < 1)
            ):
                raise ValueError(f"{option.name} must be at least 1: {value!r}")
    scheduler, parallel = config.scheduler, config.parallel
    if scheduler.overlap_depth not in (0, 1):
        raise ValueError(f"overlap_depth must be 0 or 1: {scheduler.overlap_depth!r}")
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        raise ValueError(
            "max_num_batched_tokens must be at least max_num_seqs, so that every running request "
            f"can decode in each step: {scheduler.max_num_batched_tokens} < {scheduler.max_num_seqs}"
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ValueError(f"{name} must be 1 in this release: {getattr(parallel, name)!r}")
