# SPDX-License-Identifier: MIT
"""Options and a loaded part -> `Speculator`. Knows which drafters there are, no requests."""

import logging
from collections.abc import Iterable

from torch import nn

from tokenspeed.config import EngineConfig
from tokenspeed.engine.depths import Depths
from tokenspeed.engine.ledger import Ledger
from tokenspeed.engine.pacing import Pacing
from tokenspeed.engine.part import Part, mesh_of
from tokenspeed.engine.speculator import Speculator, Weighted
from tokenspeed.engine.step_times import Experts, StepTimes
from tokenspeed.execution.speculation.drafter import TokenDrafter
from tokenspeed.execution.speculation.ngram import NgramDrafter
from tokenspeed.execution.speculation.options import Speculation, check_depth, speculation_of
from tokenspeed.execution.speculation.suffix import SuffixDrafter
from tokenspeed.layers.moe import MoE

_log = logging.getLogger(__name__)


def make_speculator(
    config: EngineConfig, part: Part, times: StepTimes, pacing: Pacing | None = None
) -> Speculator | None:
    """None where speculation is off. `ValueError`: drafts that long do not fit."""
    asked = speculation_of(config, part.model.target.device.type)
    check_depth(asked, part.max_model_len)
    tokens = [_token_drafter(name, asked) for name in asked.token_methods]
    weighted = None
    if part.drafter is not None:
        weighted = Weighted(part.drafter.name, part.drafter.max_depth)
    names = [drafter.name for drafter in tokens] + ([weighted.name] if weighted else [])
    if not names:
        return None
    how = "as many as pay" if asked.adaptive else "always"
    _log.info("speculative decoding: %s, %d tokens, %s", " + ".join(names), asked.depth, how)
    depths, ahead = None, config.scheduler.overlap_depth > 0
    if asked.adaptive:
        # Ahead, who speculates is in every other step, which such a rate of a step does not tell.
        least_rates = None if pacing is None or ahead else pacing.policy.least_rates
        depths = Depths(len(names), config.scheduler.max_num_batched_tokens, times, least_rates)
    return Speculator(
        tokens,
        depth=asked.depth,
        weighted=weighted,
        depths=depths,
        num_dp=mesh_of(config).dp,
        ledger=Ledger() if asked.adaptive and not ahead and mesh_of(config).dp == 1 else None,
        ahead=ahead,
    )


def experts_of(modules: Iterable[nn.Module]) -> Experts:
    """Of the first layer that has any."""
    for module in modules:
        if isinstance(module, MoE):
            routing = module.gate.routing
            return Experts(routing.num_experts, routing.top_k)
    return Experts()


def _token_drafter(name: str, asked: Speculation) -> TokenDrafter:
    if name == "ngram":
        return NgramDrafter(asked.prompt_lookup_min, asked.prompt_lookup_max)
    return SuffixDrafter(asked.suffix_min_match, asked.shared_store_tokens)
