# SPDX-License-Identifier: MIT
"""All options: frozen, composed, resolved once. Reads no file and no device.

What launchers say in environment variables is read here and nowhere else. Groups say what an option
can change: `ModelOptions` and `kv_cache_dtype` change answers, the others change only speed, memory
and reachability. The CLI and `docs/parameters.md` are made from here.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

DType = Literal["auto", "float32", "bfloat16"]
CacheDType = Literal["auto", "float32", "bfloat16", "int8"]
Device = Literal["auto", "cpu", "cuda"]
Quantizations = Literal["none", "int8", "int4", "fp8", "mxfp4", "nvfp4"]
MAX_TPS_FLOOR = 10_000  # kMostFloor of csrc/scheduler/pacer.h
MAX_PRIORITY = 1000  # of a request, either way from 0
Launcher = Literal["local", "torchrun", "ray"]
Communication = Literal["auto", "shm", "gloo", "nccl"]


def option(default: Any, text: str, *aliases: str, low: float | None = None) -> Any:
    """A field with its help text, further flag names, and the least value it may take."""
    return field(default=default, metadata={"help": text, "aliases": aliases, "low": low})


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how its numbers are held. These options change answers."""

    model: str = option("demo", "a folder, a hub id, or `demo`, the model in the package")
    tokenizer: str | None = option(None, "a folder or hub id of another tokenizer")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    served_model_name: tuple[str, ...] = option((), "names that clients may ask for")
    dtype: DType = option("auto", "of weights and activations; auto: the checkpoint's")
    quantization: Quantizations = option("none", "how weights are held, whatever the checkpoint's")
    quantization_group_size: int = option(32, "inputs that share a scale in int8 and int4", low=32)
    device: Device = option("auto", "auto: the first device with kernels for every op")
    kernel_backend: tuple[str, ...] = option((), "OP=BACKEND: whose kernel to take for an op")
    max_model_len: int | None = option(None, "tokens of prompt and answer together", low=1)
    skip_tokenizer_init: bool = option(False, "token ids in, token ids out")
    chat_template: str | None = option(None, "a Jinja file in place of the model's own")
    answer_format: str | None = option(None, "format of answers; default: the chat template's")
    seed: int = option(0, "of requests that bring none", low=0)
    max_logprobs: int = option(20, "most logprobs a request may ask for", low=0)


@dataclass(frozen=True)
class CacheOptions:
    """The paged KV cache. `kv_cache_dtype` changes answers, the rest performance."""

    kv_cache_dtype: CacheDType = option("auto", "of keys and values; auto: the model's")
    page_size: int = option(64, "tokens in a page", "--block-size", low=1)
    num_pages: int | None = option(None, "pages of KV", "--num-gpu-blocks-override", low=1)
    kv_cache_memory_bytes: int | None = option(None, "bytes of KV, if num_pages is unset", low=1)
    enable_prefix_caching: bool = option(True, "reuse the KV of prompts seen before")
    retention_share: float = option(0.5, "of the pages, for retention hints and pins", low=0)


@dataclass(frozen=True)
class SchedulerOptions:
    """How steps are filled. These options change performance, never tokens."""

    max_num_seqs: int = option(64, "requests that run at once", low=1)
    max_num_batched_tokens: int = option(1024, "tokens in one step", low=1)
    max_num_partial_prefills: int = option(4, "prompts prefilled in turns at once", low=1)
    overlap_depth: int = option(0, "steps planned before the last result is known: 0 or 1", low=0)
    enforce_eager: bool = option(False, "never capture decode steps to replay them")
    cuda_graph_max_bs: int = option(64, "most rows of a captured step on a GPU", low=1)
    max_queue_len: int = option(1024, "requests that may wait; more are answered 503", low=1)
    cpu_threads: int | None = option(
        None, "threads of a rank's CPU kernels; unset: one for each core that it may use", low=1
    )


@dataclass(frozen=True)
class PacingOptions:
    """What streams are promised, and who waits for it. They change performance, never tokens."""

    tps_floor: float | None = option(
        None, "tokens per second that each stream is promised; unset: no pacing", low=0
    )
    max_queue_wait_s: float | None = option(
        None, "seconds that a request may wait; what waits longer, or would, is answered 503", low=0
    )

    @property
    def is_on(self) -> bool:
        return self.tps_floor is not None or self.max_queue_wait_s is not None


@dataclass(frozen=True)
class SpeculationOptions:
    """Drafts of tokens, verified in one step. These options change performance, never tokens."""

    speculative_config: str | None = option(
        None, "JSON, as vLLM's (see speculation.md); unset: drafts on a CPU, as many as pay"
    )
    speculative_model: str | None = option(None, "older: the key `model` of speculative_config")
    num_speculative_tokens: int | None = option(None, "older: the key of the same name", low=1)
    speculative_draft_tensor_parallel_size: int | None = option(
        None, "older: the key `draft_tensor_parallel_size`", low=1
    )


@dataclass(frozen=True)
class ParallelOptions:
    """How many devices share the model."""

    tensor_parallel_size: int = option(1, "devices that share each layer", "-tp", low=1)
    expert_parallel_size: int = option(1, "devices that share the experts", "-ep", low=1)
    attention_data_parallel_size: int = option(
        1, "groups of devices with requests of their own, which share the experts", low=1
    )
    pipeline_parallel_size: int = option(1, "devices that share the layers", "-pp", low=1)
    data_parallel_size: int = option(1, "engines behind one gateway", "-dp", low=1)
    launcher: Launcher = option("local", "who starts the ranks: this process, torchrun or Ray")
    communication: Communication = option(
        "auto", "what tensors travel over; auto: shm within a machine on CPUs, else gloo or nccl"
    )


@dataclass(frozen=True)
class ExpertOptions:
    """Which rank holds which experts. These options change performance, and the order of sums."""

    enable_eplb: bool = option(False, "measure which experts are busy, and move them between ranks")
    num_redundant_experts: int = option(0, "slots for second copies in each layer", low=0)
    eplb_window_steps: int = option(1000, "steps whose load counts", low=1)
    eplb_step_interval: int = option(3000, "steps between two rebalances", low=1)


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine needs, in groups. Build it with `EngineConfig.of(**flat_options)`."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    pacing: PacingOptions = field(default_factory=PacingOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    experts: ExpertOptions = field(default_factory=ExpertOptions)

    @classmethod
    def of(cls, **options: Any) -> "EngineConfig":
        """Builds a config from flat option names; unknown names raise `ValueError`.

        `speculative_config` may be a dict, too.
        """
        if isinstance(asked := options.get("speculative_config"), dict):
            options["speculative_config"] = json.dumps(asked)
        groups: dict[str, Any] = {}
        for name, kind in cls.groups().items():
            names = {f.name for f in dataclasses.fields(kind)}
            groups[name] = kind(**{n: options.pop(n) for n in names & options.keys()})
        if options:
            raise ValueError(f"unknown option {', '.join(sorted(options))}")
        return cls(**groups)

    def to_json(self) -> str:
        """Every option by its flat name."""
        groups = (dataclasses.asdict(getattr(self, name)) for name in self.groups())
        return json.dumps({k: v for group in groups for k, v in group.items()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "EngineConfig":
        """The inverse of `to_json`. `ValueError` for anything else."""
        options = json.loads(text)
        lists = {name: tuple(v) for name, v in options.items() if isinstance(v, list)}
        return cls.of(**options | lists)

    def digest(self) -> str:
        """The same for the same options, in any process."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def groups(cls) -> dict[str, Any]:
        """The group classes by field name."""
        return {f.name: f.default_factory for f in dataclasses.fields(cls)}

    def __post_init__(self) -> None:
        for name in self.groups():
            check_options(getattr(self, name))
        scheduler, parallel, experts = self.scheduler, self.parallel, self.experts
        if scheduler.overlap_depth > 1:
            raise ValueError(f"overlap_depth must be 0 or 1: {scheduler.overlap_depth}")
        if self.cache.retention_share > 1:
            raise ValueError(f"retention_share must be at most 1: {self.cache.retention_share}")
        if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs, so that each running request"
                f" can decode in every step: {scheduler.max_num_batched_tokens}"
                f" < {scheduler.max_num_seqs}"
            )
        self._check_pacing()
        if experts.enable_eplb and parallel.expert_parallel_size == 1:
            raise ValueError(
                "enable_eplb needs expert_parallel_size above 1: experts must have ranks"
            )
        if experts.num_redundant_experts and not experts.enable_eplb:
            raise ValueError(
                "num_redundant_experts needs enable_eplb: nothing else would choose what they copy"
            )
        if parallel.pipeline_parallel_size > 1 and scheduler.overlap_depth:
            raise ValueError(
                "overlap_depth must be 0 with pipeline_parallel_size above 1: stages overlap anyway"
            )
        if parallel.data_parallel_size > 1 and parallel.launcher != "local":
            raise ValueError(
                "data_parallel_size above 1 needs launcher local: start one server for each engine,"
                f" or leave launcher {parallel.launcher}"
            )

    def _check_pacing(self) -> None:
        floor, parallel = self.pacing.tps_floor, self.parallel
        if floor is not None and not 0 < floor <= MAX_TPS_FLOOR:
            raise ValueError(f"tps_floor must be in (0, {MAX_TPS_FLOOR}]: {floor}")
        for name in ("pipeline_parallel_size", "attention_data_parallel_size"):
            if self.pacing.is_on and getattr(parallel, name) > 1:
                raise ValueError(
                    f"tps_floor and max_queue_wait_s need {name} 1: a step's time is foretold for"
                    " one scheduler and one stage"
                )


@dataclass(frozen=True)
class ServerOptions:
    """How the gateway is reached, how long it waits, and how conversations become prompts.

    `canonical_rules` and `history_bytes` change prompts, and `enable_forced_output` lets requests
    change answers; the others never do.
    """

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one", low=0)
    uds: str | None = option(None, "a Unix socket to listen on in place of host and port")
    api_key: tuple[str, ...] = option((), "keys of which a request must bring one")
    tenants: str | None = option(None, "a JSON file of tenants: keys, roles, limits")
    log_requests: bool = option(False, "one line in the log for each request, without contents")
    otlp_endpoint: str | None = option(None, "URL that OpenTelemetry spans are sent to")
    admin_port: int | None = option(None, "moves /metrics and admin routes to a port of their own")
    canonical_rules: tuple[str, ...] = option(
        ("all",), "what clients rotate and is taken out of prompts: all, none, or names of rules"
    )
    history_bytes: int = option(
        256 * 2**20,
        "for ids of answers that may come back; 0: every prompt is tokenised anew",
        low=0,
    )
    max_body_bytes: int = option(32 * 2**20, "larger bodies are answered 413", low=1024)
    num_gateways: int = option(1, "processes that share the port and the work of HTTP", low=1)
    keepalive_s: float = option(5.0, "seconds between SSE comments while nothing comes", low=0.01)
    drain_timeout_s: float = option(30.0, "seconds that open requests get after SIGTERM", low=0)
    enable_forced_output: bool = option(
        False, "requests may dictate their answers, so that replays are exact; not in production"
    )
    watchdog_timeout_s: float = option(
        60.0, "seconds without a step before readiness ends", low=0.1
    )

    def __post_init__(self) -> None:
        check_options(self)


def check_options(group: Any) -> None:
    """Refuses values out of range: `ValueError` naming the option, before anything is allocated."""
    for f in dataclasses.fields(group):
        value, low = getattr(group, f.name), f.metadata.get("low")
        if get_origin(f.type) is Literal and value not in get_args(f.type):
            raise ValueError(f"{f.name} must be one of {', '.join(get_args(f.type))}: {value!r}")
        if f.type == tuple[str, ...] and not isinstance(value, list | tuple):
            raise ValueError(f"{f.name} must be a list of texts: {value!r}")
        if low is None or value is None:
            continue
        kinds = (int, float) if float in (f.type, *get_args(f.type)) else int
        number = isinstance(value, kinds)
        if isinstance(value, bool) or not number or not low <= value < math.inf:
            raise ValueError(f"{f.name} must be a number of at least {low}: {value!r}")


@dataclass(frozen=True)
class TorchrunPlace:
    """Where torchrun has put this process; `host` and `port` are those of its key-value store."""

    rank: int
    num_ranks: int
    num_local: int  # ranks that the same agent started
    node: int
    host: str
    port: int
    run_id: str
    restart: int
    agent_has_store: bool


def torchrun_place(environment: Mapping[str, str] = os.environ) -> TorchrunPlace:
    """From torchrun's variables. `ValueError`: torchrun has not started this process."""

    def number(name: str) -> int:
        if not (text := environment.get(name, "")).isdecimal():
            raise ValueError(
                f"launcher torchrun: the environment has no {name}; start with `torchrun"
                " --nproc-per-node N -m tokenspeed serve ...`"
                if name not in environment
                else f"launcher torchrun: {name} is no number: {text!r}"
            )
        return int(text)

    numbers = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    rank, num_ranks, num_local, node, port = (number(name) for name in numbers)
    if not (host := environment.get("MASTER_ADDR")):
        raise ValueError("launcher torchrun: the environment has no MASTER_ADDR")
    return TorchrunPlace(
        rank,
        num_ranks,
        num_local,
        node,
        host,
        port,
        run_id=environment.get("TORCHELASTIC_RUN_ID", "none"),
        restart=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        agent_has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where files are kept that can be made again: XDG_CACHE_HOME/tokenspeed."""
    base = environment.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "tokenspeed"


def traces_place(environment: Mapping[str, str] = os.environ) -> Path:
    """Recorded sessions, their folder or their file: TOKENSPEED_TRACES. `ValueError` without it."""
    if not (place := environment.get("TOKENSPEED_TRACES")):
        raise ValueError(
            "recorded sessions: TOKENSPEED_TRACES must name a folder with sessions.jsonl.gz, or"
            " such a file"
        )
    return Path(place)


def ray_address(environment: Mapping[str, str] = os.environ) -> str | None:
    """The Ray cluster that RAY_ADDRESS names, if it does."""
    return environment.get("RAY_ADDRESS") or None
