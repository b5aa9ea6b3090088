# SPDX-License-Identifier: MIT
"""`ScriptedForCausalLM`: a model that says what a script tells it, through the real engine.

Each token's id is kept in the paged cache where others keep keys; the next token of a row follows
from all ids that its pages hold. So the text that comes out is right only if batches, chunks,
prefix cache and retraction are. Knows no text: `tokenspeed_scripted_folder.py` makes the script.

The script is the object `script` of config.json, all in token ids:

    header   ids that begin an assistant's turn; the newest one in a context is the answer's
    end      the id that ends a turn
    plays    [{"cues": [ids, ...], "answers": [ids, ...]}, ...]: the first play of which a cue
             stands in the context is given; its n-th answer in the n-th assistant's turn after it
    other    what is said where no play or no answer is left
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenspeed.errors import ModelLoadError
from tokenspeed.kernels.quant import Quantization
from tokenspeed.layers.batch import ForwardBatch
from tokenspeed.layers.cache_spec import CacheSpec
from tokenspeed.models.llama import LlamaForCausalLM

Ids = NDArray[np.int64]
_SURE = 100.0  # the logit of the token that is said; all others have 0


@dataclass(frozen=True)
class Play:
    """Answers that are given, turn by turn, once the cue has been heard."""

    cues: list[Ids]
    answers: list[Ids]


@dataclass(frozen=True)
class Script:
    """What is said when; see the top of this file."""

    header: Ids
    end: int
    plays: list[Play]
    other: Ids

    @classmethod
    def read(cls, given: Any) -> "Script":
        """`ModelLoadError` for a script that is none."""
        try:
            plays = [Play(_lists(p["cues"]), _lists(p["answers"])) for p in given["plays"]]
            header, other = _ids(given["header"]), _ids(given["other"])
            return cls(header, int(given["end"]), plays, other)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(f"config.json has no script that can be played: {error}") from None

    def next_id(self, context: Ids) -> int:
        """The id that follows these."""
        headers = places(context, self.header)
        if not len(headers):
            return self.end
        said = len(context) - int(headers[-1]) - len(self.header)
        line = self._line(context, headers)
        return int(line[said]) if said < len(line) else self.end

    def _line(self, context: Ids, headers: Ids) -> Ids:
        for play in self.plays:
            heard = [int(at[0]) for cue in play.cues if len(at := places(context, cue))]
            if heard:
                turn = int((headers > min(heard)).sum()) - 1
                return play.answers[turn] if turn < len(play.answers) else self.other
        return self.other


class ScriptedForCausalLM(LlamaForCausalLM):
    """A tiny Llama in shape; its answers come from the script. Serve it with `--enforce-eager`."""

    script: Script

    @classmethod
    def from_config(
        cls,
        hf_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
        quantization: Quantization | None = None,
    ) -> Self:
        model = super().from_config(hf_config, torch.float32, device, max_model_len, quantization)
        model.script = Script.read(hf_config.get("script"))
        return model

    def cache_specs(self, dtype: torch.dtype | None = None) -> list[CacheSpec]:
        """One number a token: its id, which float32 holds exactly up to 2^24."""
        return [CacheSpec(((1,),), torch.float32)]

    def forward(self, batch: ForwardBatch, caches: list[tuple[Tensor, ...]]) -> Tensor:
        """[T, 1]: the id that follows a token, where logits are wanted; elsewhere 0."""
        ids = caches[0][0].view(-1)
        ids[batch.cache_index] = batch.token_ids.to(ids.dtype)
        page_size = caches[0][0].shape[1]
        hidden = torch.zeros((len(batch.token_ids), 1))
        ends = batch.q_start[1:]
        for place in batch.logits_index.tolist():  # several of a row that verifies drafts
            row = int(torch.searchsorted(ends, place, right=True))
            length = int(batch.kv_len[row]) - int(ends[row]) + place + 1
            pages = batch.page_table[batch.slots[row], : -(-length // page_size)].long()
            context = ids.view(-1, page_size)[pages].view(-1)[:length]
            hidden[place] = self.script.next_id(context.to(torch.int64).numpy())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, 1] -> [L, vocab_size]"""
        logits = torch.zeros((len(hidden), self.vocab_size))
        return logits.scatter_(1, hidden.long(), _SURE)


def places(context: Ids, part: Ids) -> Ids:
    """Where `part` begins in `context`, in order."""
    count = len(context) - len(part) + 1
    if count <= 0 or not len(part):
        return np.zeros(0, np.int64)
    found = context[:count] == part[0]
    for i in range(1, len(part)):
        found &= context[i : i + count] == part[i]
    return np.flatnonzero(found)


def _lists(given: Any) -> list[Ids]:
    return [_ids(each) for each in given]


def _ids(given: Any) -> Ids:
    return np.array(given, np.int64).reshape(-1)
