# SPDX-License-Identifier: MIT
"""An engine that says what it is told, in odd tokens, and has a prefix cache in pages."""

from collections.abc import Sequence

from benchmarks.null_engine import PAGE_SIZE, Echo, _Running
from tokenspeed.engine import messages as m
from tokenspeed.text.tokenizer import Tokenizer


def odd_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as no tokenizer would cut it: added tokens whole, all else by the character."""
    added = sorted(tokenizer.added_tokens.values(), key=len, reverse=True)
    ids: list[int] = []
    while text:
        piece = next((token for token in added if text.startswith(token)), text[0])
        ids += tokenizer.encode(piece, add_special_tokens=False)
        text = text[len(piece) :]
    return ids


class SessionEngine(Echo):
    """Answers requests with the scripts in turn. `prompts` and `totals` are what it has seen."""

    def __init__(self, scripts: Sequence[list[int]]) -> None:
        super().__init__()
        self.scripts = list(scripts)
        self.prompts: list[list[int]] = []
        self.totals: list[list[int]] = []  # prompt and answer
        self._number: dict[int, int] = {}

    def add(self, request: m.GenerateRequest) -> None:
        prompt = list(request.prompt_ids)
        # The last id of an answer has not been computed on.
        shared = max((common(total[:-1], prompt[:-1]) for total in self.totals), default=0)
        number = self._number[request.request_id] = len(self.prompts)
        self.prompts.append(prompt)
        self.totals.append(list(prompt))
        room = request.params.max_tokens or len(self.scripts[number])
        cached = shared // PAGE_SIZE * PAGE_SIZE
        self.waiting[request.request_id] = _Running(request, cached, room)

    def _advance(self, request_id: int, r: _Running) -> m.TokenOutput:
        number = self._number[request_id]
        script = self.scripts[number]
        token = script[r.num_out]
        r.num_out += 1
        self.totals[number].append(token)
        stopped = token in r.request.stop_ids
        over = stopped or r.num_out >= min(r.max_tokens, len(script))
        return m.TokenOutput(
            request_id,
            [token],
            finish_reason=("stop" if stopped else "length") if over else None,
            stop_token_id=token if stopped else None,
            num_cached_tokens=r.num_cached,
        )


def common(a: list[int], b: list[int]) -> int:
    """Leading ids that are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
