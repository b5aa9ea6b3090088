# SPDX-License-Identifier: MIT
"""`EngineConfig` -> `Engine`: builds the collaborators and joins them. Knows no requests."""

from collections.abc import Callable
from pathlib import Path

import torch

from tokenspeed._scheduler import Scheduler
from tokenspeed.config import EngineConfig
from tokenspeed.engine.engine import Engine
from tokenspeed.engine.messages import GenerateRequest, Ready
from tokenspeed.execution.batch import Batcher
from tokenspeed.execution.kv_cache import KVCache, choose_num_pages, fit_max_model_len
from tokenspeed.execution.runner import Runner
from tokenspeed.execution.sampler import Sampler
from tokenspeed.execution.sampling_params import SamplingParams
from tokenspeed.models.build import load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.hub import resolve_model

Progress = Callable[[float, str], None]  # share of the whole start-up, what is being done

WEIGHTS_SHARE, READY_SHARE = 0.95, 0.97  # of the start-up, as the progress counts it
WARM_UP_TOKENS = 40
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
) -> Engine:
    """Loads the model and allocates everything. `ModelLoadError`, or `ValueError` for options.

    `num_sharers`: engines that divide this machine's memory among them.
    """
    tell = progress or (lambda fraction, what: None)
    tell(0.0, "resolving the model")
    device = _device(config.model.device)
    model = load_model(
        folder or resolve_folders(config)[0],
        DTYPES[config.model.dtype],
        device,
        config.model.max_model_len,
        progress=lambda fraction: tell(fraction * WEIGHTS_SHARE, "loading weights"),
    )
    tell(WEIGHTS_SHARE, "allocating the KV cache")
    engine = assemble(config, model, device, num_sharers)
    tell(READY_SHARE, "warming up")
    warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """Answers one request of ours, so that the first client finds everything loaded.

    What kernels refuse, such as a combination of dtypes, is a `ValueError` here and now.
    """
    longest = engine.ready.max_model_len
    length = min(WARM_UP_TOKENS, longest - 1)
    params = SamplingParams(max_tokens=min(2, longest - length), seed=0, prompt_logprobs=0)
    engine.add_request(GenerateRequest(0, [0] * length, params))
    while engine.has_work():
        engine.step()
    engine.flush_cache()


def assemble(
    config: EngineConfig, model: CausalLM, device: torch.device, num_sharers: int = 1
) -> Engine:
    """The engine around a loaded model. `ValueError` if the cache cannot hold one request."""
    options, depth = config.scheduler, config.scheduler.overlap_depth
    page_size = config.cache.page_size
    specs = model.cache_specs(DTYPES[config.cache.kv_cache_dtype])
    longest = config.model.max_model_len or model.max_position
    num_pages = choose_num_pages(
        config.cache,
        specs,
        max_model_len=longest,
        max_num_seqs=options.max_num_seqs,
        num_sharers=num_sharers,
    )
    max_model_len = fit_max_model_len(config.model.max_model_len, longest, num_pages, page_size)
    scheduler = Scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_num_partial_prefills=options.max_num_partial_prefills,
        overlap_depth=depth,
        enable_prefix_caching=config.cache.enable_prefix_caching,
    )
    seats = options.max_num_seqs
    runner = Runner(
        model,
        KVCache(specs, num_pages=num_pages, page_size=page_size, device=device),
        Batcher(
            max_num_seqs=seats, max_model_len=max_model_len, page_size=page_size, device=device
        ),
        Sampler(max_num_seqs=seats, vocab_size=model.vocab_size, device=device),
        max_num_seqs=seats,
        overlap_depth=depth,
    )
    return Engine(
        scheduler,
        runner,
        Ready(max_model_len, model.vocab_size, num_pages, page_size),
        max_logprobs=config.model.max_logprobs,
        overlap_depth=depth,
        seed=config.model.seed,
    )


def _device(name: str) -> torch.device:
    if name == "cuda":
        raise ValueError("device: this release has kernels for the CPU only; leave it at auto")
    return torch.device("cpu")
