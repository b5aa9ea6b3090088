# SPDX-License-Identifier: MIT
"""`Speculation`: what was asked of speculative decoding, read from JSON and checked.

The keys are vLLM's (`--speculative-config`) and a few of ours. Knows no drafter, no checkpoint and
no file: whether the model has what a method needs is found out by who builds it.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from tokenspeed.config import EngineConfig, SpeculationOptions

TOKEN_METHODS: Final = ("ngram", "suffix")  # cheapest first
MODEL_METHODS: Final = ("mtp", "eagle3", "draft_model")
METHODS: Final = ("auto", "off", *TOKEN_METHODS, *MODEL_METHODS)
ALIASES: Final = {"deepseek_mtp": "mtp"}
_NGRAM_MODELS: Final = ("ngram", "[ngram]")  # how the method was named before there were methods
LEARNT_DEPTH: Final = 32  # most tokens of a draft, if nobody says
FIXED_DEPTH: Final = 4
MAX_LEARNT_DEPTH: Final = 128  # `_policy.MAX_DEPTH`: what is deeper is never chosen
MAX_LOOKUP: Final = 64  # `kMaxN` of csrc/drafts

_ALL = frozenset(METHODS) - {"off"}
_KEYS: Final[dict[str, tuple[type, frozenset[str]]]] = {  # type, and the methods that have a use
    "method": (str, frozenset(METHODS)),
    "model": (str, frozenset({"eagle3", "draft_model"})),
    "num_speculative_tokens": (int, _ALL),
    "draft_tensor_parallel_size": (int, frozenset({"draft_model"})),
    "prompt_lookup_min": (int, frozenset({"ngram"})),
    "prompt_lookup_max": (int, frozenset({"ngram"})),
    "adaptive": (bool, _ALL),
    "suffix_min_match": (int, frozenset({"auto", "suffix"})),
    "shared_store_tokens": (int, frozenset({"auto", "suffix"})),
}
_LEAST: Final[dict[str, int]] = {"shared_store_tokens": 0}  # of numbers; 1 otherwise
GREATEST: Final = 2**31 - 1
_WORDS: Final = {str: "a text", int: "an integer", bool: "true or false"}


@dataclass(frozen=True)
class Speculation:
    """Which drafters to ask, cheapest first, and how.

    `methods` is empty where speculation is off. `is_auto`: nobody asked for a method, so one that
    the checkpoint has no weights for is left out; otherwise that is an error.
    """

    methods: tuple[str, ...] = ("suffix", "mtp")
    is_auto: bool = True
    model: str | None = None  # folder or hub id of the draft model or head
    num_tokens: int | None = None  # most tokens of a draft, if anybody said so
    draft_tensor_parallel_size: int = 1
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    adaptive: bool = True  # how deep is learnt; else always `depth`
    suffix_min_match: int = 2  # tokens that must match before a suffix is worth a draft
    shared_store_tokens: int = 1 << 20  # of recent answers, within a salt; 0: none

    @property
    def depth(self) -> int:
        """Most tokens of a draft."""
        return self.num_tokens or (LEARNT_DEPTH if self.adaptive else FIXED_DEPTH)

    @property
    def token_methods(self) -> tuple[str, ...]:
        return tuple(method for method in self.methods if method in TOKEN_METHODS)

    @property
    def model_method(self) -> str | None:
        """The one method that has weights of its own."""
        return next((method for method in self.methods if method in MODEL_METHODS), None)


OFF: Final = Speculation(methods=(), is_auto=False, adaptive=False)


def speculation_of(config: EngineConfig, device: str = "cpu") -> Speculation:
    """What the options ask for, on a device of this type. `ValueError` naming what is wrong."""
    asked = _asked(config.speculation)
    if not asked:
        return _default(config, device)
    if "method" not in asked and "model" in asked:
        asked["method"] = "ngram" if asked["model"] in _NGRAM_MODELS else "draft_model"
    if asked.get("method") == "ngram" and asked.get("model") in _NGRAM_MODELS:
        del asked["model"]
    names = _method_names(asked.pop("method", "auto"))
    _check_use(asked, names)
    made = _made(asked, names, config)
    limit = config.model.max_model_len
    if limit is not None:
        check_depth(made, limit)
    if (made.num_tokens or 0) >= config.scheduler.max_num_batched_tokens:
        raise ValueError(
            f"speculative_config: num_speculative_tokens {made.num_tokens} must be below"
            f" max_num_batched_tokens {config.scheduler.max_num_batched_tokens}"
        )
    _check_learnt(made)
    _check_lookup(made)
    _check_mesh(made, config)
    return made


def _default(config: EngineConfig, device: str) -> Speculation:
    """If nobody asks: `auto` where what drafts cost is watched and little. A step that verifies is
    not captured on a GPU or with several ranks, and nobody watches overlapped steps."""
    scheduler, parallel = config.scheduler, config.parallel
    ranks = (parallel.tensor_parallel_size, parallel.expert_parallel_size)
    if device != "cpu" or scheduler.overlap_depth or max(ranks) > 1 or _divides(config):
        return OFF
    return Speculation()


def check_depth(speculation: Speculation, max_model_len: int) -> None:
    """`ValueError`: a draft as long as was asked for never fits."""
    if (speculation.num_tokens or 0) >= max_model_len:
        raise ValueError(
            f"speculative_config: num_speculative_tokens {speculation.num_tokens} must be below"
            f" max_model_len {max_model_len}"
        )


def _asked(options: SpeculationOptions) -> dict[str, Any]:
    """The keys and values that were given, in the new form or in the older one."""
    older = {
        "model": options.speculative_model,
        "num_speculative_tokens": options.num_speculative_tokens,
        "draft_tensor_parallel_size": options.speculative_draft_tensor_parallel_size,
    }
    asked: dict[str, Any] = {key: value for key, value in older.items() if value is not None}
    if options.speculative_config is None:
        return asked
    if asked:
        raise ValueError(
            f"speculative_config and the older option for its key {next(iter(asked))} were both"
            " given: leave one of them out"
        )
    try:
        read = json.loads(options.speculative_config)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"speculative_config is not valid JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"speculative_config must be a JSON object: {read!r}")
    for key, value in read.items():
        _check_value(key, value)
    return read


def _check_value(key: str, value: Any) -> None:
    if key not in _KEYS:
        raise ValueError(f"speculative_config: unknown key {key!r}; known keys: {', '.join(_KEYS)}")
    kind = _KEYS[key][0]
    least = _LEAST.get(key, 1)
    if type(value) is not kind:
        raise ValueError(f"speculative_config: {key} must be {_WORDS[kind]}: {value!r}")
    number: Any = value
    if kind is int and number < least:
        raise ValueError(f"speculative_config: {key} must be at least {least}: {value}")
    if kind is int and number > GREATEST:
        raise ValueError(f"speculative_config: {key} must be at most {GREATEST}: {value}")


def _method_names(text: str) -> list[str]:
    """The methods of a text such as `suffix+mtp`, cheapest first."""
    names = [ALIASES.get(name.strip(), name.strip()) for name in text.split("+")]
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"speculative_config: unknown method {name!r}; known methods: {', '.join(METHODS)}"
            )
    if len(names) > 1 and {"auto", "off"} & set(names):
        raise ValueError(f"speculative_config: method {text!r}: auto and off stand alone")
    models = [name for name in names if name in MODEL_METHODS]
    if len(set(names)) < len(names) or len(models) > 1:
        raise ValueError(
            f"speculative_config: method {text!r}: each at most once, and of"
            f" {', '.join(MODEL_METHODS)} at most one"
        )
    return sorted(names, key=METHODS.index)


def _check_use(asked: dict[str, Any], names: list[str]) -> None:
    """Each key must mean something to a method, and each method must have what it needs."""
    for key in asked:
        if not _KEYS[key][1].intersection(names):
            raise ValueError(f"speculative_config: method {'+'.join(names)} has no use for {key}")
    for name in names:
        if name in _KEYS["model"][1] and "model" not in asked:
            raise ValueError(f"speculative_config: method {name} needs a model")


def _made(asked: dict[str, Any], names: list[str], config: EngineConfig) -> Speculation:
    values = dict(asked)
    if "num_speculative_tokens" in values:
        values["num_tokens"] = values.pop("num_speculative_tokens")
    if names == ["off"]:
        return OFF
    if names == ["auto"]:
        methods = ("suffix",) if _divides(config) else ("suffix", "mtp")
        return Speculation(methods=methods, **values)
    return Speculation(methods=tuple(names), is_auto=False, **values)


def _check_learnt(made: Speculation) -> None:
    if made.adaptive and made.depth > MAX_LEARNT_DEPTH:
        raise ValueError(
            f"speculative_config: num_speculative_tokens {made.depth} is above {MAX_LEARNT_DEPTH},"
            " as deep as adaptive goes; deeper drafts need adaptive false"
        )


def _check_lookup(made: Speculation) -> None:
    if made.prompt_lookup_min > made.prompt_lookup_max:
        raise ValueError(
            f"speculative_config: prompt_lookup_min {made.prompt_lookup_min} is above"
            f" prompt_lookup_max {made.prompt_lookup_max}"
        )
    if made.prompt_lookup_max > MAX_LOOKUP:
        raise ValueError(
            f"speculative_config: prompt_lookup_max {made.prompt_lookup_max} is above {MAX_LOOKUP},"
            " the longest text that is looked for"
        )


def _divides(config: EngineConfig) -> str:
    """The option that divides requests or layers over ranks, if any does."""
    parallel = config.parallel
    if parallel.attention_data_parallel_size > 1:
        return "attention_data_parallel_size"
    return "pipeline_parallel_size" if parallel.pipeline_parallel_size > 1 else ""


def _check_mesh(made: Speculation, config: EngineConfig) -> None:
    if made.model_method is None:
        return
    if name := _divides(config):
        raise ValueError(
            f"speculative_config: method {made.model_method} needs {name} 1: its drafter runs with"
            " the last layers, for all requests"
        )
    size, whole = made.draft_tensor_parallel_size, config.parallel.tensor_parallel_size
    if size not in (1, whole):
        raise ValueError(
            f"speculative_config: draft_tensor_parallel_size must be 1 or {whole}, as the model's:"
            f" {size}"
        )
