# SPDX-License-Identifier: MIT
"""One rank's part of an engine: its share of the model, its pages, and what runs its steps.

The same on every rank, rank 0 included. Knows no requests and no way in which ranks meet.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tokenspeed.config import EngineConfig
from tokenspeed.engine.model_drafters import make_model_drafter, wanted_mtp
from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.expert_balancer import ExpertBalancer, make_balancer
from tokenspeed.execution.kv_cache import KVCache, choose_num_pages, fit_max_model_len
from tokenspeed.execution.recorders import CpuRecorder, CudaRecorder, Outputs
from tokenspeed.execution.sampler import Sampler
from tokenspeed.execution.speculation.model_drafter import ChainDrafter, Room
from tokenspeed.execution.speculation.options import speculation_of
from tokenspeed.execution.step_graphs import StepGraphs
from tokenspeed.execution.step_runner import StepRunner
from tokenspeed.kernels.device import use_cpu_threads
from tokenspeed.kernels.quant import Quantization
from tokenspeed.kernels.registry import force_backends, forced_by
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.models.build import Ranks, load_model, plan_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.spmd.group import Communicator
from tokenspeed.spmd.mesh import Mesh

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_DTYPES = DTYPES | {"int8": torch.uint8}  # rows of int8 features and their scales are bytes


@dataclass(frozen=True)
class Agreement:
    """What all ranks must have alike: each proposes what fits it, the least is taken."""

    num_pages: int

    def facts(self) -> dict[str, int]:
        return asdict(self)


Agree = Callable[[Agreement], Agreement]


@dataclass(frozen=True)
class Part:
    """`samples`: this rank gives the tokens of its dp index. `drafter`: one with weights."""

    model: CausalLM
    runner: StepRunner
    balancer: ExpertBalancer | None
    dp: int
    samples: bool
    num_pages: int
    max_model_len: int
    drafter: ChainDrafter | None = None


def mesh_of(config: EngineConfig) -> Mesh:
    """The ranks of one engine. `ValueError`: sizes that do not fit together."""
    parallel = config.parallel
    return Mesh(
        tp=parallel.tensor_parallel_size,
        ep=parallel.expert_parallel_size,
        dp=parallel.attention_data_parallel_size,
        pp=parallel.pipeline_parallel_size,
    )


def device_of(config: EngineConfig) -> torch.device:
    """The GPU that this process uses, if there is one. `ValueError`: it was asked for in vain."""
    asked, found = config.model.device, torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise ValueError(f"device: torch {torch.__version__} finds no GPU here; leave it at auto")
    if asked == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def quantization_of(config: EngineConfig) -> Quantization | None:
    """How the weights shall be held; None: as the checkpoint has them."""
    form = config.model.quantization
    return None if form == "none" else Quantization(form, config.model.quantization_group_size)


def build_part(
    config: EngineConfig,
    folder: Path,
    *,
    rank: int = 0,
    communicator: Communicator | None = None,
    agree: Agree = lambda mine: mine,
    num_sharers: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Part:
    """Loads this rank's share of the model in `folder` and allocates its pages.

    `ModelLoadError`, `ValueError` for options, `RankDiedError`. `num_sharers` processes divide this
    machine's memory.
    """
    ranks = _ranks(config, rank, communicator)
    dtype, limit = DTYPES[config.model.dtype], config.model.max_model_len
    quantization = quantization_of(config)
    device = device_of(config)
    speculation = speculation_of(config, device.type)
    if (threads := config.scheduler.cpu_threads) is not None:
        if device.type != "cpu":
            raise ValueError(f"cpu_threads: {threads}, but the kernels run on {device.type}")
        use_cpu_threads(threads)
    mtp, kv_dtype = wanted_mtp(speculation), CACHE_DTYPES[config.cache.kv_cache_dtype]
    with force_backends(forced_by(config.model.kernel_backend)):
        model = load_model(folder, dtype, device, limit, progress, ranks, quantization, mtp=mtp)
        drafter = make_model_drafter(speculation, model, folder, ranks, kv_dtype)
        return assemble_part(config, model, rank, agree, num_sharers, drafter)


def graph_sizes(config: EngineConfig, device: torch.device) -> list[int]:
    """Rows of the decode steps that are captured beforehand; none on a CPU, or without graphs."""
    scheduler = config.scheduler
    if device.type == "cpu" or scheduler.enforce_eager or mesh_of(config).num_ranks > 1:
        return []
    most = min(scheduler.cuda_graph_max_bs, scheduler.max_num_seqs)
    return sorted({size for size in (1, 2, 4, *range(8, most, 8)) if size < most} | {most})


def make_graphs(
    config: EngineConfig, model: CausalLM, cache: KVCache, sizes: list[int]
) -> StepGraphs | None:
    """What captures decode steps; None where that is switched off or ranks talk in between."""
    if config.scheduler.enforce_eager or mesh_of(config).num_ranks > 1:
        return None

    def compute(batch: ForwardBatch) -> Outputs:
        hidden = model.forward(batch, cache.layers)
        return hidden, model.logits(hidden), *model.aux_hidden

    recorder = CudaRecorder() if model.target.device.type == "cuda" else CpuRecorder()
    return StepGraphs(compute, recorder, max_rows=config.scheduler.max_num_seqs, sizes=sizes)


def check_mesh(config: EngineConfig, folder: Path) -> None:
    """Refuses a mesh that the model cannot be divided over: `ValueError`, `ModelLoadError`.

    Reads config.json alone, so that no rank need be started to learn it.
    """
    dtype, limit = DTYPES[config.model.dtype], config.model.max_model_len
    plan_model(folder, dtype, device_of(config), limit, _ranks(config))


def _ranks(config: EngineConfig, rank: int = 0, communicator: Communicator | None = None) -> Ranks:
    return Ranks(
        mesh_of(config),
        rank,
        communicator,
        max_tokens=config.scheduler.max_num_batched_tokens,
        num_redundant_experts=config.experts.num_redundant_experts,
    )


def assemble_part(
    config: EngineConfig,
    model: CausalLM,
    rank: int = 0,
    agree: Agree = lambda mine: mine,
    num_sharers: int = 1,
    drafter: ChainDrafter | None = None,
) -> Part:
    """The part around a loaded share. `ValueError` if the cache cannot hold one request."""
    mesh = mesh_of(config)
    seats, page_size = config.scheduler.max_num_seqs, config.cache.page_size
    device = model.target.device
    specs = model.cache_specs(CACHE_DTYPES[config.cache.kv_cache_dtype])
    draft_specs = [] if drafter is None else drafter.cache_specs
    longest = config.model.max_model_len or model.max_position
    fits = choose_num_pages(
        config.cache,
        [*specs, *draft_specs],
        max_model_len=longest,
        max_num_seqs=seats,
        num_sharers=num_sharers,
        device=device,
    )
    num_pages = agree(Agreement(fits)).num_pages
    max_model_len = fit_max_model_len(config.model.max_model_len, longest, num_pages, page_size)
    spmd = model.spmd
    samples = spmd.samples and mesh.atoms_index(mesh.same_tokens, rank) == 0
    balancer = make_balancer(model, config.experts)
    sizes = graph_sizes(config, device)
    pages = num_pages + bool(sizes)  # the last one is for rows that only fill a step up
    room = Room(seats, max_model_len, page_size)
    cache = _make_cache(config, model, specs, drafter, room, pages)
    runner = StepRunner(
        model,
        cache,
        Batcher(
            max_num_seqs=seats,
            max_model_len=max_model_len,
            page_size=page_size,
            device=device,
            scratch_page=num_pages if sizes else None,
        ),
        Sampler(max_num_seqs=seats, vocab_size=model.vocab_size, device=device)
        if samples
        else None,
        spmd=spmd if mesh.num_ranks > 1 else None,
        logits=spmd.samples,
        ahead=config.scheduler.overlap_depth > 0,
        peers=spmd.peers,
        balancer=balancer,
        graphs=make_graphs(config, model, cache, sizes),
        drafter=drafter,
    )
    if sizes:
        runner.capture(sizes)
    dp = mesh.index("dp", rank)
    return Part(model, runner, balancer, dp, samples, num_pages, max_model_len, drafter)


def _make_cache(
    config: EngineConfig,
    model: CausalLM,
    specs: list[CacheSpec],
    drafter: ChainDrafter | None,
    room: Room,
    num_pages: int,
) -> KVCache:
    """The model's pages and the drafter's, which from now on has them."""
    device = model.target.device
    cache = KVCache(
        specs,
        num_pages=num_pages,
        page_size=room.page_size,
        device=device,
        draft_specs=[] if drafter is None else drafter.cache_specs,
        num_draft_pages=0 if drafter is None else drafter.num_own_pages(room),
    )
    if drafter is None:
        return cache
    captures = device.type == "cpu" and not config.scheduler.enforce_eager
    recorder = CpuRecorder() if captures and mesh_of(config).num_ranks == 1 else None
    drafter.attach(cache.draft_layers, room, num_pages, recorder)
    return cache
