# SPDX-License-Identifier: MIT
"""A second model that drafts for a first: over which ranks, and whether its tokens are the same.

Knows no requests, and nothing of how drafts are made.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.build import Ranks, build_model, load_model
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.hf_config import read_json
from tokenspeed.spmd.mesh import Mesh

TOKENIZER = "tokenizer.json"


def ranks_beside(ranks: Ranks, tp: int) -> Ranks:
    """Those of a drafter whose weights `tp` ranks divide, beside a model over `ranks`.

    With `tp` 1 every rank holds all of it and asks nobody. `ValueError`: a mesh with dp or pp, or
    one whose ranks are not those `tp`.
    """
    mesh = ranks.mesh
    if mesh.dp > 1 or mesh.pp > 1:
        raise ValueError(f"mesh {mesh}: drafters with weights run with dp 1 and pp 1")
    if tp == 1:
        return Ranks(max_tokens=ranks.max_tokens)
    if tp != mesh.num_ranks:
        raise ValueError(
            f"mesh {mesh}: a drafter's weights are whole on each rank, or divided over all "
            f"{mesh.num_ranks} of them, not over {tp}"
        )
    return Ranks(Mesh(tp=tp), ranks.rank, ranks.communicator, ranks.max_tokens)


def load_draft_model(
    folder: Path,
    target: CausalLM,
    target_folder: Path,
    ranks: Ranks | None = None,
    tp: int = 1,
) -> CausalLM:
    """The model in `folder`, in its own dtype and for its own context length.

    `target_folder` holds the loaded target or its tokenizer. Raises `ModelLoadError` if the
    vocabularies differ or the folder is wrong, `ValueError` for a mesh: see `ranks_beside`.
    """
    own, device = ranks_beside(ranks or Ranks(), tp), target.target.device
    found = build_model(folder, None, device)[0].vocab_size  # before weights are read
    if found != target.vocab_size:
        why = f"{found} tokens, and the target has {target.vocab_size}"
        raise ModelLoadError(f"{folder}: config.json: vocab_size: {why}")
    check_same_tokens(folder, target_folder)
    return load_model(folder, None, device, ranks=own)


def check_same_tokens(folder: Path, target_folder: Path) -> None:
    """`ModelLoadError` names the first id that is another token. Without two tables none is."""
    paths = folder / TOKENIZER, target_folder / TOKENIZER
    if not all(path.exists() for path in paths):
        return
    mine, theirs = (_tokens(path) for path in paths)
    for number in sorted(mine.keys() | theirs.keys()):
        if mine.get(number) != theirs.get(number):
            raise ModelLoadError(
                f"{paths[0]}: token {number} is {_named(mine.get(number))}, and the target's is "
                f"{_named(theirs.get(number))}: drafts need the same vocabulary"
            )


def _named(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _tokens(path: Path) -> dict[int, str]:
    """Texts by id: the model's vocabulary and what was added to it."""
    read = read_json(path)
    model = read.get("model")
    vocab: Any = model.get("vocab") if isinstance(model, Mapping) else None
    added: Any = read.get("added_tokens") or []
    try:
        if isinstance(vocab, Mapping):
            found = {int(number): str(text) for text, number in vocab.items()}
        else:  # a list of texts and scores
            found = {number: str(entry[0]) for number, entry in enumerate(vocab)}
        return found | {int(token["id"]): str(token["content"]) for token in added}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ModelLoadError(f"{path}: holds no vocabulary: {error}") from error
