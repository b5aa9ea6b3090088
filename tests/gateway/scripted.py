# SPDX-License-Identifier: MIT
"""`Scripted`: an engine that answers with given texts, however they are cut into tokens."""

from collections.abc import Sequence

from benchmarks.null_engine import Echo
from tests.gateway.harness import TOKENIZER
from tokenspeed.engine import messages as m


class Scripted(Echo):
    """The n-th request gets the n-th answer, those after the last one the last, then stops.

    An answer is a text, or pieces of text that are each tokenised alone. `burst` tokens come a
    step. `error`: instead of ending, the answer breaks with it.
    """

    def __init__(
        self, *answers: str | Sequence[str], burst: int = 1, error: str | None = None
    ) -> None:
        super().__init__()
        self.answers = [[one] if isinstance(one, str) else list(one) for one in answers]
        self.burst, self.error = burst, error
        self.prompts: list[list[int]] = []
        self._scripts: dict[int, list[int]] = {}

    def add(self, request: m.GenerateRequest) -> None:
        pieces = self.answers[min(len(self.prompts), len(self.answers) - 1)]
        ids = [i for piece in pieces for i in TOKENIZER.encode(piece, add_special_tokens=False)]
        self._scripts[request.request_id] = [*ids, TOKENIZER.eos_ids[0]]
        self.prompts.append(request.prompt_ids)
        super().add(request)

    def step(self) -> list[m.TokenOutput]:
        self.num_steps += 1
        self.admit()
        outputs = [self._next(request_id) for request_id in list(self.running)]
        for output in outputs:
            if output.finish_reason is not None:
                del self.running[output.request_id]
        return outputs

    def _next(self, request_id: int) -> m.TokenOutput:
        running, script = self.running[request_id], self._scripts[request_id]
        first, over = running.num_out, min(running.num_out + self.burst, running.max_tokens)
        ids = script[first:over]
        running.num_out += len(ids)
        stopped = running.num_out == len(script)
        finish = "stop" if stopped else "length" if over == running.max_tokens else None
        if stopped and self.error is not None:
            return m.TokenOutput(request_id, [], "error", error=self.error)
        return m.TokenOutput(
            request_id,
            ids,
            finish_reason=finish,
            stop_token_id=ids[-1] if stopped else None,
            num_cached_tokens=running.num_cached,
        )
