# SPDX-License-Identifier: MIT
"""Options: refused when wrong, and each one read somewhere."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tokenspeed import LLM, _policy
from tokenspeed._drafts import NgramDrafter
from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.execution.speculation.options import (
    MAX_LEARNT_DEPTH,
    MAX_LOOKUP,
    OFF,
    Speculation,
    speculation_of,
)

GROUPS = [*EngineConfig.groups().values(), ServerOptions]


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 0},
        {"page_size": True},
        {"page_size": 1.5},
        {"max_model_len": -1},
        {"dtype": "int3"},
        {"device": "tpu"},
        {"overlap_depth": 2},
        {"tensor_parallel_size": 0},
        {"pipeline_parallel_size": 2, "overlap_depth": 1},
        {"data_parallel_size": 0},
        {"retention_share": 1.5},
        {"max_num_seqs": 64, "max_num_batched_tokens": 63},
        {"max_modle_len": 100},
    ],
    ids=str,
)
def test_wrong_engine_options_are_refused_by_name(options: dict[str, object]) -> None:
    name = list(options)[-1]
    with pytest.raises(ValueError, match=name):
        EngineConfig.of(**options)


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_several_engines_are_started_by_this_process_only(launcher: str) -> None:
    assert EngineConfig.of(data_parallel_size=3).parallel.data_parallel_size == 3
    with pytest.raises(ValueError, match=f"data_parallel_size above 1 .* launcher {launcher}"):
        EngineConfig.of(data_parallel_size=2, launcher=launcher)


def test_an_llm_is_one_engine() -> None:
    with pytest.raises(ValueError, match="data_parallel_size is 2, and an LLM is one engine"):
        LLM(data_parallel_size=2)


@pytest.mark.parametrize(
    "options", [{"port": -1}, {"keepalive_s": float("nan")}, {"drain_timeout_s": float("inf")}]
)
def test_wrong_server_options_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerOptions(**options)  # type: ignore[arg-type]


def test_every_option_is_read_somewhere(repository: Path) -> None:
    sources = "\n".join(
        path.read_text()
        for path in (repository / "tokenspeed").rglob("*.py")
        if path.name != "config.py" and "cli" not in path.parts
    )
    for group in GROUPS:
        for field in dataclasses.fields(group):
            if group.__name__ == "ParallelOptions":
                continue  # refused unless 1, in config.py itself
            assert re.search(rf"\.{field.name}\b", sources), f"{field.name} is never read"


def test_every_option_has_help() -> None:
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert field.metadata["help"]


@pytest.mark.parametrize("value", ["bogus", "", "int4 ", 3, ["int8"]])
def test_a_format_that_there_is_not_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="quantization must be one of none, int8"):
        EngineConfig.of(quantization=value)


def test_one_text_is_no_list_of_them() -> None:
    with pytest.raises(ValueError, match="kernel_backend must be a list of texts: 'add=reference'"):
        EngineConfig.of(kernel_backend="add=reference")


def speculation(config: object = None, **options: Any) -> Speculation:
    if config is not None:
        options["speculative_config"] = config if isinstance(config, str) else json.dumps(config)
    return speculation_of(EngineConfig.of(**options))


READS: list[tuple[dict[str, Any], str, object]] = [
    ({"method": "ngram"}, "methods", ("ngram",)),
    ({"method": "ngram"}, "is_auto", False),
    ({"method": "draft_model", "model": "x/y"}, "model", "x/y"),
    ({"num_speculative_tokens": 3}, "num_tokens", 3),
    (
        {"method": "draft_model", "model": "x", "draft_tensor_parallel_size": 2},
        "draft_tensor_parallel_size",
        2,
    ),
    ({"method": "ngram", "prompt_lookup_min": 3}, "prompt_lookup_min", 3),
    ({"method": "ngram", "prompt_lookup_max": 9}, "prompt_lookup_max", 9),
    ({"adaptive": False}, "adaptive", False),
    ({"method": "suffix", "suffix_min_match": 7}, "suffix_min_match", 7),
    ({"shared_store_tokens": 0}, "shared_store_tokens", 0),
]


@pytest.mark.parametrize(("asked", "name", "value"), READS, ids=str)
def test_each_key_of_speculation_is_read(asked: dict[str, Any], name: str, value: object) -> None:
    found = getattr(speculation(asked, tensor_parallel_size=2), name)
    assert found == value
    assert found != getattr(Speculation(), name)
    assert {name for _, name, _ in READS} == {f.name for f in dataclasses.fields(Speculation)}


def test_drafts_are_the_default_where_their_cost_is_watched_and_little() -> None:
    assert speculation() == Speculation()
    assert speculation_of(EngineConfig.of(), "cuda") == OFF
    divided = ("tensor", "expert", "pipeline", "attention_data")
    for options in ({"overlap_depth": 1}, *({f"{name}_parallel_size": 2} for name in divided)):
        assert speculation(None, **options) == OFF
        assert speculation({"method": "suffix"}, **options).methods == ("suffix",)


def test_auto_is_what_nobody_said_otherwise() -> None:
    made = speculation({"adaptive": True})
    assert (made, made.is_auto, made.adaptive) == (Speculation(), True, True)
    assert (made.token_methods, made.model_method, made.depth) == (("suffix",), "mtp", 32)
    assert speculation({"method": "auto"}) == made
    off = speculation({"method": "off"})
    assert (off.methods, off.model_method) == ((), None)
    auto = {"method": "auto"}
    assert speculation(auto, attention_data_parallel_size=2).methods == ("suffix",)
    assert speculation(auto, pipeline_parallel_size=2).methods == ("suffix",)


@pytest.mark.parametrize(
    ("asked", "methods"),
    [
        ({"method": "mtp+suffix"}, ("suffix", "mtp")),
        ({"method": "suffix + ngram"}, ("ngram", "suffix")),
        ({"method": "deepseek_mtp"}, ("mtp",)),
        ({"model": "x"}, ("draft_model",)),
        ({"model": "[ngram]"}, ("ngram",)),
        ({"method": "eagle3", "model": "x"}, ("eagle3",)),
    ],
    ids=str,
)
def test_methods_are_asked_cheapest_first(asked: dict[str, Any], methods: tuple[str, ...]) -> None:
    assert speculation(asked).methods == methods


def test_the_older_options_of_speculation_mean_the_same() -> None:
    older = {"speculative_model": "x", "num_speculative_tokens": 4}
    size = {"speculative_draft_tensor_parallel_size": 2}
    newer = {"model": "x", "num_speculative_tokens": 4, "draft_tensor_parallel_size": 2}
    made = speculation(newer, tensor_parallel_size=2)
    assert speculation(**older, **size, tensor_parallel_size=2) == made
    assert speculation(speculative_model="[ngram]").methods == ("ngram",)
    assert speculation(num_speculative_tokens=4).depth == 4
    for name, value in (older | size).items():
        with pytest.raises(ValueError, match="speculative_config and the older option"):
            speculation({"method": "auto"}, **{name: value})


REFUSED = [
    ("{", "speculative_config is not valid JSON"),
    (3, "must be a JSON object: 3"),
    ([], r"must be a JSON object: \[\]"),
    ({"methods": "ngram"}, "unknown key 'methods'; known keys: method, model"),
    ({"method": "medusa"}, "unknown method 'medusa'; known methods: auto, off, ngram"),
    ({"method": "ngram+"}, "unknown method ''"),
    ({"method": None}, "method must be a text: None"),
    ({"method": "off+ngram"}, "auto and off stand alone"),
    ({"method": "ngram+ngram"}, "each at most once"),
    ({"method": "mtp+deepseek_mtp"}, "each at most once"),
    ({"method": "mtp+eagle3", "model": "x"}, "of mtp, eagle3, draft_model at most one"),
    ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens must be at least 1"),
    ({"num_speculative_tokens": True}, "num_speculative_tokens must be an integer: True"),
    ({"num_speculative_tokens": 2.0}, "num_speculative_tokens must be an integer: 2.0"),
    ({"adaptive": 1}, "adaptive must be true or false: 1"),
    ({"method": "suffix", "shared_store_tokens": -1}, "shared_store_tokens must be at least 0"),
    ({"method": "off", "adaptive": True}, "method off has no use for adaptive"),
    ({"method": "suffix", "prompt_lookup_min": 2}, "suffix has no use for prompt_lookup_min"),
    ({"method": "mtp", "model": "x"}, "method mtp has no use for model"),
    ({"method": "eagle3"}, "method eagle3 needs a model"),
    ({"method": "draft_model"}, "method draft_model needs a model"),
    (
        {"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3},
        "prompt_lookup_min 4 is above prompt_lookup_max 3",
    ),
    ({"method": "ngram", "prompt_lookup_max": 65}, "prompt_lookup_max 65 is above 64, the longest"),
    ({"num_speculative_tokens": 129}, "num_speculative_tokens 129 is above 128, .* adaptive false"),
    (
        {"method": "suffix", "suffix_min_match": 2**31},
        "suffix_min_match must be at most 2147483647",
    ),
    (
        {"method": "suffix", "num_speculative_tokens": 1024, "adaptive": False},
        "num_speculative_tokens 1024 must be below max_num_batched_tokens 1024",
    ),
    (
        {"model": "x", "draft_tensor_parallel_size": 2},
        "draft_tensor_parallel_size must be 1 or 1, as the model's: 2",
    ),
]


def test_the_bounds_of_speculation_are_those_of_the_compiled_parts() -> None:
    assert MAX_LEARNT_DEPTH == _policy.MAX_DEPTH
    deepest = {"method": "ngram", "num_speculative_tokens": _policy.MAX_DEPTH}
    assert speculation(deepest).depth == _policy.MAX_DEPTH
    deeper = {"method": "ngram", "num_speculative_tokens": 129, "adaptive": False}
    assert speculation(deeper).depth == 129
    longest = {"method": "ngram", "prompt_lookup_max": MAX_LOOKUP}
    assert speculation(longest).prompt_lookup_max == MAX_LOOKUP
    NgramDrafter(1, MAX_LOOKUP)
    with pytest.raises(ValueError, match="prompt_lookup_max"):
        NgramDrafter(1, MAX_LOOKUP + 1)


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=str)
def test_wrong_speculation_is_refused_with_the_reason(asked: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speculation(asked)


@pytest.mark.parametrize("name", ["attention_data_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("method", ["mtp", "suffix+eagle3", "draft_model"])
def test_model_drafters_refuse_some_meshes(method: str, name: str) -> None:
    asked = {"method": method} | ({} if method == "mtp" else {"model": "x"})
    with pytest.raises(ValueError, match=f"method {method.split('+')[-1]} needs {name} 1"):
        speculation(asked, **{name: 2})


def test_a_draft_must_fit_the_context() -> None:
    assert speculation({"num_speculative_tokens": 7}, max_model_len=8).depth == 7
    assert speculation({"adaptive": False}).depth == 4
    # Nobody asked for so many: they are shortened.
    assert speculation({"adaptive": True}, max_model_len=4).depth == 32
    with pytest.raises(ValueError, match="num_speculative_tokens 8 must be below max_model_len 8"):
        speculation({"num_speculative_tokens": 8}, max_model_len=8)


def test_speculation_may_be_a_dict_in_python() -> None:
    config = EngineConfig.of(speculative_config={"method": "ngram"})
    assert speculation_of(config).methods == ("ngram",)
    assert EngineConfig.from_json(config.to_json()) == config
