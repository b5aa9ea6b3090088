# SPDX-License-Identifier: MIT
"""The one message a step: every dp index's plan, and what a remote sampler must know of requests.

    | header, 8 words: magic, version, words in all, plans, binds, bytes of JSON, 0, 0 |
    | words of each plan, 0 for none | plan 0 | plan 1 | ...                           |
    | prompt ids, then output ids, of each bind | compiled grammars, each padded to a word |
    | JSON of the binds and the grammars, padded to a word |

All words are little-endian int32. The way back is a `StepOutput`: its words, then JSON. Bytes that
do not hold what they say are a `ValueError`. Knows no sockets.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenspeed.errors import RequestError
from tokenspeed.execution.grammars import News
from tokenspeed.execution.plan_view import STEP_VERSION, Plans, PlanView
from tokenspeed.execution.sampler import Sequence as Request
from tokenspeed.execution.sampling_params import Grammar, SamplingParams, TokenLogprobs
from tokenspeed.execution.step import Bind, StepOutput

STEP_MAGIC: Final = 0x54535354
OUTPUT_MAGIC: Final = 0x554F5354
HEADER_WORDS: Final = 8


class StepMessage(NamedTuple):
    """What a rank is told of a step. The plans may be written to."""

    plans: list[PlanView | None]  # by dp index
    binds: dict[int, list[Bind]]  # by dp index, for those whose sampler is not rank 0
    grammars: list[News]


def encode_step(
    plans: Plans,
    binds: Mapping[int, Sequence[Bind]],
    grammars: Sequence[News] = (),
) -> bytes:
    """`binds` by dp index, and `grammars`, for those whose sampler is another rank."""
    none = np.empty(0, np.int32)
    words = [none if plan is None else plan.words for plan in plans]
    arrays = [np.array([len(plan) for plan in words], np.int32), *words]
    facts: list[dict[str, Any]] = []
    for dp, each in binds.items():
        for bind in each:
            outputs = np.array(bind.output_ids, np.int32)
            arrays += [bind.sequence.prompt_ids, outputs]
            facts.append(_facts(dp, bind, len(outputs)))
    arrays += [_padded(data) for _, data in grammars if data is not None]
    news = [[key, None if data is None else len(data)] for key, data in grammars]
    text = json.dumps([facts, news]).encode() if facts or news else b""
    size = HEADER_WORDS + sum(len(array) for array in arrays) + -(-len(text) // 4)
    header = [STEP_MAGIC, STEP_VERSION, size, len(plans), len(facts), len(text), 0, 0]
    parts = [np.array(header, np.int32), *arrays]
    return b"".join([*(part.tobytes() for part in parts), text, bytes(-len(text) % 4)])


def decode_step(message: bytes) -> StepMessage:
    """The inverse of `encode_step`."""
    words = _words(message, STEP_MAGIC)
    num_plans, num_binds, num_text = words[3:6].tolist()
    rest = _Rest(words, HEADER_WORDS)
    lengths = rest.take(num_plans).tolist()
    plans = [PlanView(rest.take(length)) if length else None for length in lengths]
    binds: dict[int, list[Bind]] = {}
    grammars: list[News] = []
    if num_text:
        with _described():
            facts, news = json.loads(_text(words, num_text))
            if len(facts) != num_binds:
                raise ValueError(f"a step message of {num_binds} binds describes {len(facts)}")
            for fact in facts:
                binds.setdefault(range(num_plans)[fact["dp"]], []).append(_bind(fact, rest))
            grammars = [
                (str(key), None if size is None else rest.take(-(-size // 4)).tobytes()[:size])
                for key, size in news
            ]
    return StepMessage(plans, binds, grammars)


def encode_output(output: StepOutput) -> bytes:
    """For the scheduler's rank."""
    facts = {
        "logprobs": [
            [i, [dataclasses.astuple(entry) for entry in entries]]
            for i, entries in output.logprobs.items()
        ],
        "prompt_logprobs": [
            [i, [[at, dataclasses.astuple(entry)] for at, entry in entries.items()]]
            for i, entries in output.prompt_logprobs.items()
        ],
        "drafts": list(output.drafts.items()),
    }
    text = json.dumps(facts).encode() if any(facts.values()) else b""
    size = HEADER_WORDS + len(output.words) + -(-len(text) // 4)
    header = [OUTPUT_MAGIC, STEP_VERSION, size, len(output.words), 0, len(text), 0, 0]
    head = np.array(header, np.int32).tobytes()
    return b"".join([head, output.words.tobytes(), text, bytes(-len(text) % 4)])


def decode_output(message: bytes) -> StepOutput:
    """The inverse of `encode_output`."""
    words = _words(message, OUTPUT_MAGIC)
    num_words, _, num_text = words[3:6].tolist()
    result = _Rest(words, HEADER_WORDS).take(num_words)
    if not num_text:
        return StepOutput(result, {}, {})
    with _described():
        facts = json.loads(_text(words, num_text))
        return StepOutput(
            result,
            {i: [TokenLogprobs(*e) for e in entries] for i, entries in facts["logprobs"]},
            {
                i: {at: TokenLogprobs(*entry) for at, entry in entries}
                for i, entries in facts["prompt_logprobs"]
            },
            dict(facts["drafts"]),
        )


def _words(message: bytes, magic: int) -> NDArray[np.int32]:
    if len(message) % 4 or len(message) < 4 * HEADER_WORDS:
        raise ValueError(f"a message of {len(message)} bytes is none of this layout")
    words = np.frombuffer(bytearray(message), np.int32)  # a copy of our own: torch may write
    if words[0] != magic or words[1] != STEP_VERSION or words[2] != len(words):
        raise ValueError("not a step's message of this layout's version")
    if (words[3:6] < 0).any() or words[5] > len(message):
        raise ValueError("a step's message counts what it does not hold")
    return words


def _text(words: NDArray[np.int32], num_bytes: int) -> bytes:
    return words[len(words) - -(-num_bytes // 4) :].tobytes()[:num_bytes]


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """JSON of another shape is a `ValueError`."""
    try:
        yield
    except (TypeError, LookupError, AttributeError, RecursionError, RequestError) as error:
        raise ValueError(f"a step's message describes nothing sensible: {error}") from None


class _Rest:
    """Takes words off the front."""

    def __init__(self, words: NDArray[np.int32], at: int) -> None:
        self._words, self._at = words, at

    def take(self, count: int) -> NDArray[np.int32]:
        if not 0 <= count <= len(self._words) - self._at:
            raise ValueError(f"a step's message of {len(self._words)} words is cut short")
        self._at += count
        return self._words[self._at - count : self._at]


def _facts(dp: int, bind: Bind, num_outputs: int) -> dict[str, Any]:
    sequence = bind.sequence
    return {
        "dp": dp,
        "slot": bind.slot,
        "id": bind.request_id,
        "num_prompt": sequence.prompt_len,
        "num_outputs": num_outputs,
        "params": dataclasses.asdict(sequence.params),
        "stop_ids": sequence.stop_ids,
        "seed": sequence.seed,
    }


def _bind(fact: dict[str, Any], rest: _Rest) -> Bind:
    prompt = rest.take(fact["num_prompt"]).copy()
    outputs = rest.take(fact["num_outputs"]).tolist()
    request = Request(prompt, _params(fact["params"]), fact["stop_ids"], fact["seed"])
    return Bind(fact["slot"], fact["id"], request, outputs)


def _padded(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data + bytes(-len(data) % 4), np.int32)


def _params(facts: dict[str, Any]) -> SamplingParams:
    if facts["grammar"] is not None:
        facts["grammar"] = Grammar(**facts["grammar"])
    if facts["logit_bias"] is not None:  # JSON's keys are texts
        facts["logit_bias"] = {int(token): bias for token, bias in facts["logit_bias"].items()}
    return SamplingParams(**facts)
