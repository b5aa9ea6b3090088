# SPDX-License-Identifier: MIT
"""From a folder to an EAGLE-3 head that can run beside its target. Knows no requests."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from tokenspeed.errors import ModelLoadError
from tokenspeed.layers.layer import Target
from tokenspeed.models.build import Ranks
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.checkpoint import Checkpoint
from tokenspeed.models.draft_model import ranks_beside
from tokenspeed.models.eagle3 import Eagle3
from tokenspeed.models.eagle3_config import read_eagle3
from tokenspeed.models.hf_config import HfConfig, read_json
from tokenspeed.models.load_report import Place
from tokenspeed.models.loader import load_weights
from tokenspeed.models.tensor_check import TensorNames
from tokenspeed.spmd.collectives import Variant
from tokenspeed.spmd.compile import compile_model
from tokenspeed.spmd.localise import localise

_log = logging.getLogger(__name__)
EMBEDDING = "embed_tokens.weight"


def load_eagle3(folder: Path, target: CausalLM, ranks: Ranks | None = None) -> Eagle3:
    """Builds the head in `folder` for a loaded target, in its dtype and over its ranks of tp.

    From now on the target leaves the residual streams that the head reads in `aux_hidden`. A head
    without an embedding reads the target's.

    Raises `ModelLoadError` for whatever is wrong with the folder, or does not fit the target, and
    `ValueError` for a mesh: see `ranks_beside`.
    """
    ranks = ranks or Ranks()
    ranks = ranks_beside(ranks, ranks.mesh.tp)
    config = read_eagle3(HfConfig(read_json(folder / "config.json")), target.config)
    plain = Target(target.target.device, target.target.dtype)
    head, checkpoint = Eagle3(plain, config), Checkpoint(folder)
    # Its steps are short: sums over tp stay whole.
    plan = compile_model(head, ranks.mesh, max_tokens=ranks.max_tokens, variant=Variant())
    head.spmd = localise(head, plan, ranks.rank, ranks.communicator)
    if EMBEDDING not in checkpoint.entries:
        if config.decoder.hidden_size != config.target_hidden_size:
            raise ModelLoadError(f"{folder}: lacks {EMBEDDING}, and the target's is not as wide")
        head.share_embedding(target.model.embed_tokens)
    place = Place(ranks.rank, ranks.mesh.num_ranks)
    load_weights(head, checkpoint, TensorNames(), None, place)
    head.draft_ids = _read_draft_ids(checkpoint, config.draft_vocab_size, target.vocab_size)
    if head.draft_ids is not None:
        head.draft_ids = head.draft_ids.to(target.target.device)
    target.aux_layers = config.aux_layers
    _log.info("an EAGLE-3 head reads what layers %s leave", config.aux_layers)
    return head


def _read_draft_ids(checkpoint: Checkpoint, num_drafts: int, vocab_size: int) -> Tensor | None:
    """`d2t` says how much larger the target's id is than the draft vocabulary's."""
    entry = checkpoint.entries.get("d2t")
    if entry is None:
        if num_drafts != vocab_size:
            raise ModelLoadError(
                f"{checkpoint.folder}: lacks d2t, which says what the {num_drafts} tokens of the "
                f"draft vocabulary are among {vocab_size}"
            )
        return None
    if entry.shape != (num_drafts,) or entry.dtype != "I64":
        raise ModelLoadError(
            f"{checkpoint.folder}: d2t: {entry.dtype} of shape {entry.shape}, must be I64 of shape "
            f"({num_drafts},)"
        )
    offsets = checkpoint.read("d2t", checkpoint.piece("d2t", (slice(None),)))
    ids = torch.arange(num_drafts) + offsets
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(set(ids.tolist())) < num_drafts:
        raise ModelLoadError(
            f"{checkpoint.folder}: d2t: does not lead to {num_drafts} different ids below "
            f"{vocab_size}"
        )
    return ids
