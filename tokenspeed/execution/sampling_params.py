# SPDX-License-Identifier: MIT
"""`SamplingParams`: how one request's tokens are chosen; `TokenLogprobs`: what it may ask to see.

Knows nothing of text, batches and tensors. Names and meanings are vLLM's. `stop` strings are cut by
the text layer and travel here only so that one object describes a request; the sampler never reads
them.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenspeed.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_N = 128
MAX_LIST = 4096  # entries of each of these:
LISTS = ("stop", "logit_bias", "allowed_token_ids", "bad_words_token_ids", "stop_token_ids")


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar that the output must follow: `key` names it (`execution/grammars.py`)."""

    key: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. Raises `RequestError` naming the field that is out of range."""

    n: int = 1
    max_tokens: int | None = 16  # None: as many as the context has room for
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # sequences that must not be completed
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None  # None: none; k: chosen token and the k likeliest
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None  # for `LLM`, which makes `grammar` of it
    grammar: Grammar | None = None
    forced_output_ids: list[int] | None = None  # the whole answer, whatever is sampled

    def __post_init__(self) -> None:
        _integer(self, "n", 1, MAX_N)
        _integer(self, "max_tokens", 1, 2**31 - 1, optional=True)
        _integer(self, "min_tokens", 0, 2**31 - 1)
        _integer(self, "top_k", -1, 2**31 - 1)
        _integer(self, "seed", -(2**63), MAX_SEED, optional=True)
        _integer(self, "logprobs", 0, 2**31 - 1, optional=True)
        _integer(self, "prompt_logprobs", 0, 2**31 - 1, optional=True)
        _number(self, "temperature", 0.0, 100.0)
        _number(self, "top_p", 0.0, 1.0, above=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "repetition_penalty", 0.01, 100.0)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, "must be true or false")
        _check_lists(self)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _refuse("allowed_token_ids", "must not be empty")
        if self.forced_output_ids is not None:
            _check_forced(self, self.forced_output_ids)
            object.__setattr__(self, "max_tokens", len(self.forced_output_ids))
            object.__setattr__(self, "min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"must be at most max_tokens ({self.max_tokens})")

    def token_ids(self) -> dict[str, list[int]]:
        """Every token id named by a field, for a range check against the vocabulary."""
        return {
            "logit_bias": list(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or [],
            "bad_words_token_ids": [t for word in self.bad_words_token_ids or () for t in word],
            "stop_token_ids": self.stop_token_ids or [],
            "forced_output_ids": self.forced_output_ids or [],
        }

    @property
    def edits_logits(self) -> bool:
        """Whether single logits are to be changed (see `execution/logit_edits.py`)."""
        lists = (self.logit_bias, self.allowed_token_ids, self.bad_words_token_ids)
        return self.min_tokens > 0 or any(lists)

    def all_stop_ids(self, eos_ids: Iterable[int]) -> list[int]:
        """The ids that end the request: the model's unless `ignore_eos`, and `stop_token_ids`.

        What follows a grammar ends where that is complete, in the model's own way; what is
        dictated, behind its last id.
        """
        if self.forced_output_ids is not None:
            return []
        ignored = self.ignore_eos and self.grammar is None
        return sorted({*([] if ignored else eos_ids), *(self.stop_token_ids or [])})

    def choices(self) -> list["SamplingParams"]:
        """`n` requests of one answer each; a seed becomes n seeds in a row."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else _wrap64(self.seed + i) for i in range(self.n)]
        return [self.replace(n=1, seed=seed) for seed in seeds]

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class TokenLogprobs:
    """One position: the chosen token first, then the likeliest in falling order."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 is the likeliest


def _wrap64(value: int) -> int:
    """Two's complement, so that a seed at the end of the range has a successor."""
    return (value + 2**63) % 2**64 - 2**63


def _check_lists(params: SamplingParams) -> None:
    """Shapes of the fields that hold lists; ids are compared with the vocabulary elsewhere."""
    stop: Any = params.stop
    if isinstance(stop, str):
        object.__setattr__(params, "stop", [stop])
    elif stop is not None and not _all(stop, str):
        _refuse("stop", "must be a string or a list of strings")
    for name in ("allowed_token_ids", "stop_token_ids"):
        ids = getattr(params, name)
        if ids is not None and not _all(ids, int):
            _refuse(name, "must be a list of token ids")
    words: Any = params.bad_words_token_ids
    if words is not None and not (_all(words, list) and all(w and _all(w, int) for w in words)):
        _refuse("bad_words_token_ids", "must be a list of lists of token ids, none of them empty")
    _check_bias(params.logit_bias)
    for name in LISTS:
        if len(getattr(params, name) or ()) > MAX_LIST:
            _refuse(name, f"at most {MAX_LIST} entries")


def _check_forced(params: SamplingParams, ids: Any) -> None:
    """What could end the answer before its last id does not go with it."""
    name = "forced_output_ids"
    if not _all(ids, int) or not ids:
        _refuse(name, "must be a list of token ids, at least one")
    for other in ("grammar", "structured_outputs", "stop"):
        if getattr(params, other):
            _refuse(name, f"cannot be combined with {other}")


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict) or not _all(list(bias), int):
        _refuse("logit_bias", "must map token ids to numbers")
    for token, value in bias.items():
        if not _is_number(value) or not -100.0 <= value <= 100.0:
            _refuse("logit_bias", f"values must be in [-100, 100], got {value!r} for {token}")


def _all(values: Any, kind: type) -> bool:
    """Whether `values` is a list of `kind`; a bool is not an int here."""
    return isinstance(values, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse(field: str, why: str) -> None:
    raise RequestError(f"{field}: {why}", field=field)


def _integer(
    params: SamplingParams, name: str, low: int, high: int, *, optional: bool = False
) -> None:
    value = getattr(params, name)
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, f"must be an integer in [{low}, {high}], got {value!r}")


def _number(
    params: SamplingParams, name: str, low: float, high: float, *, above: bool = False
) -> None:
    value = getattr(params, name)
    # Written so that NaN, which compares false with everything, is refused.
    if not _is_number(value) or not low <= value <= high or (above and value == low):
        _refuse(name, f"must be a number in {'(' if above else '['}{low}, {high}], got {value!r}")
