# SPDX-License-Identifier: MIT
"""The two interfaces of drafters: from tokens alone, and with weights of their own.

A proposal changes how many steps an output takes, never the output. Knows no method of drafting, no
scheduler and no policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed.execution.step_tensors import StepBatch
from tokenspeed.layers.cache_spec import CacheSpec


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next; none is no fault."""

    ids: list[int]
    match_len: int = 0  # tokens that matched: how much to trust it


class TokenDrafter(Protocol):
    """Finds drafts from tokens alone, on the host of rank 0, on the engine's thread."""

    name: str

    def add(self, request_id: int, prompt_ids: NDArray[np.int32], salt: bytes) -> None:
        """A request begins. Requests of different salts never learn of each other's tokens.

        `ValueError`: the id is in use, or an id of the prompt is negative.
        """

    def extend(
        self,
        request_ids: NDArray[np.uint64],
        num_ids: NDArray[np.int32],
        ids: NDArray[np.int32],
    ) -> list[int]:
        """Accepted ids of a step's requests [R]: each has the next `num_ids[r]` of them. How many
        tokens at the end of each occurred in it before. `KeyError`: no such request."""

    def propose(self, request_id: int, max_tokens: int) -> Proposal:
        """At most `max_tokens` ids. `KeyError`: no such request."""

    def remove(self, request_id: int) -> None:
        """The request ended. `KeyError`: no such request."""

    def forget_ended(self) -> None:
        """Drops what it kept of requests that ended."""


@dataclass(frozen=True)
class DraftWork:
    """What the step that has just sampled leaves for a model drafter.

    T tokens in R rows; D is the model's width, V its vocabulary.
    """

    batch: StepBatch  # the step that ran
    hidden: torch.Tensor  # [T, D] the model's normalised hidden states (before logits)
    aux_hidden: list[torch.Tensor]  # EAGLE-3: residual streams [T, D] after chosen layers; or empty
    row_sample: NDArray[np.bool_]  # [R] rows that sampled
    accepted: NDArray[np.int32]  # [R] ids accepted; 0: the row does not sample, or failed
    ids: torch.Tensor  # int64 [T]: id sampled after each token; only accepted places count
    num_propose: NDArray[np.int32]  # [R]
    # (logits [n, V], slots [n], places [n]) -> ids [n]: the noise of the model's sampler, no state
    sample: Callable[[torch.Tensor, NDArray[np.int32], torch.Tensor], torch.Tensor]


class ModelDrafter(Protocol):
    """Proposes with weights of its own, on every rank, in the step that has just sampled.

    Its KV is of settled positions, of every prefill chunk and every accepted token but for those of
    steps that it skips; what it needs of a chunk's last token, whose successor is not known yet, it
    carries per slot. Its pages are the model's: a prefix hit brings its KV too.
    """

    name: str
    max_depth: int
    cache_specs: list[CacheSpec]  # its layers' KV, in the same pages as the model's

    @property
    def num_slow(self) -> int:
        """Calls so far that took longer than others like them will."""

    def bind(self, slots: NDArray[np.int32]) -> None:
        """These slots begin anew."""

    def skips(self, *, asked: bool) -> bool:
        """Once for each step: whether it has no use for it. `asked`: drafts are wanted of it."""

    def draft(self, work: DraftWork) -> torch.Tensor:
        """Unless it skips the step: int64 [R, max num_propose]: proposed ids, -1 where none."""
