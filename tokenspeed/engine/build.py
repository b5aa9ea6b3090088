# SPDX-License-Identifier: MIT
"""`EngineConfig` -> `Engine`: meets the other ranks, builds the collaborators and joins them.

Knows no requests.
"""

from collections.abc import Callable
from pathlib import Path

from tokenspeed._scheduler import Scheduler
from tokenspeed.config import EngineConfig
from tokenspeed.engine.drafting import experts_of, make_speculator
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import GenerateRequest, Ready
from tokenspeed.engine.pacing import Pacing
from tokenspeed.engine.part import Part, build_part, check_mesh, mesh_of
from tokenspeed.engine.ranks.crew import Crew
from tokenspeed.engine.ranks.muster import muster
from tokenspeed.engine.schedulers import Schedulers
from tokenspeed.engine.step_times import StepTimes
from tokenspeed.errors import RankDiedError
from tokenspeed.execution.runner import Runner
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.execution.speculation.options import speculation_of
from tokenspeed.models.hub import resolve_model

Progress = Callable[[float, str], None]  # share of the whole start-up, what is being done
OnDeath = Callable[[RankDiedError], None]

WEIGHTS_SHARE, READY_SHARE = 0.95, 0.97  # of the start-up, as the progress counts it
WARM_UP_TOKENS = 40


def resolve_folders(config: EngineConfig) -> tuple[Path, Path]:
    """The folders of the model and of its tokenizer, fetched if need be. `ModelLoadError`."""
    options = config.model
    model = resolve_model(options.model, options.revision)
    return model, resolve_model(options.tokenizer) if options.tokenizer else model


def build_engine(
    config: EngineConfig,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    num_sharers: int = 1,
    on_death: OnDeath | None = None,
) -> Engine:
    """Loads the model on all ranks and allocates everything.

    `ModelLoadError`, `ValueError` for options, `RankDiedError` if another rank ends meanwhile; then
    and later `on_death` is told, from another thread. `num_sharers`: engines that divide this
    machine's memory among them.
    """
    tell = progress or (lambda fraction, what: None)
    speculation_of(config)  # what is wrong with it is said before anything is fetched
    tell(0.0, "resolving the model")
    folder = folder or resolve_folders(config)[0]
    num_ranks = mesh_of(config).num_ranks
    if num_ranks > 1:
        tell(0.0, f"waiting for {num_ranks - 1} other rank(s)")
        check_mesh(config, folder)

    def loading(fraction: float) -> None:
        met.check()  # big weights take minutes, and another rank may have died meanwhile
        tell(fraction * WEIGHTS_SHARE, "loading weights")

    met = muster(config, folder, num_sharers, on_death)
    try:
        part = build_part(
            config,
            folder,
            communicator=met.communicator,
            agree=met.agree,
            num_sharers=num_sharers * met.num_neighbours,
            progress=loading,
        )
        met.wait_until_ready()
        tell(READY_SHARE, "warming up")
        engine = assemble(config, part, met.crew)
        warm_up(engine)
    except BaseException as error:
        met.close_after(error)
        raise
    return engine


def warm_up(engine: Engine) -> None:
    """Answers requests of ours, so that the first client finds everything loaded.

    What kernels refuse, such as a combination of dtypes, is a `ValueError` here and now.
    """
    longest = engine.ready.max_model_len
    length = min(WARM_UP_TOKENS, longest - 1)
    params = SamplingParams(max_tokens=min(2, longest - length), seed=0, prompt_logprobs=0)
    engine.add_request(GenerateRequest(0, [0] * length, params))
    while engine.has_work():
        engine.step()
    engine.flush_cache()


def assemble(config: EngineConfig, part: Part, crew: Crew | None = None) -> Engine:
    """The engine around rank 0's part."""
    options, mesh = config.scheduler, mesh_of(config)
    schedulers = [
        Scheduler(
            num_pages=part.num_pages,
            page_size=config.cache.page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=part.max_model_len,
            max_num_partial_prefills=options.max_num_partial_prefills,
            overlap_depth=options.overlap_depth,
            num_micro_steps=mesh.pp,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            retention_share=config.cache.retention_share,
        )
        for _ in range(mesh.dp)
    ]
    depth, balancer = options.overlap_depth + mesh.pp - 1, part.balancer
    runner = Runner(
        part.runner,
        max_num_seqs=options.max_num_seqs,
        num_dp=mesh.dp,
        crew=crew,
        remote=range(mesh.dp) if mesh.pp > 1 else range(1, mesh.dp),
        threaded=depth > 0,
    )
    times = StepTimes(experts_of(part.model.modules()))
    pacing = make_pacing(config, times)
    return Engine(
        Schedulers(schedulers),
        runner,
        Ready(
            part.max_model_len,
            part.model.vocab_size,
            part.num_pages * mesh.dp,
            config.cache.page_size,
        ),
        max_logprobs=config.model.max_logprobs,
        depth=depth,
        balance=None if balancer is None else lambda: balancer.stats,
        times=times,
        speculator=make_speculator(config, part, times, pacing),
        pacing=pacing,
        seed=config.model.seed,
    )


def make_pacing(config: EngineConfig, times: StepTimes) -> Pacing | None:
    """None where nobody asked for floors or for an end of waiting."""
    if not config.pacing.is_on:
        return None
    return Pacing(config.pacing, max_num_seqs=config.scheduler.max_num_seqs, times=times)
