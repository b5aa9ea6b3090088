# SPDX-License-Identifier: MIT
"""Options: refused when wrong, and each one read somewhere."""

import dataclasses
import re
from pathlib import Path

import pytest

from tokenspeed import LLM
from tokenspeed.config import EngineConfig, ServerOptions

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
