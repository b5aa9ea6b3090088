# SPDX-License-Identifier: MIT
"""The command line: flags made from the config, and wrong ones answered with the right name."""

import dataclasses
from pathlib import Path

import pytest

from tokenspeed.cli import chat, parameters
from tokenspeed.cli.main import build_parser, main
from tokenspeed.cli.options import engine_options, flag_of, options_of
from tokenspeed.config import EngineConfig, ServerOptions
from tokenspeed.errors import TokenSpeedError


def test_every_option_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for group in [*EngineConfig.groups().values(), ServerOptions]:
        for field in dataclasses.fields(group):
            if field.name != "model":
                assert flag_of(field.name) in text, field.name


def test_flags_become_options() -> None:
    args = build_parser().parse_args(
        "serve some/model --max-model-len 4096 --block-size 16 --no-enable-prefix-caching"
        " --api-key a b --api-key c --port 0".split()
    )
    assert engine_options(args) == {
        "model": "some/model",
        "max_model_len": 4096,
        "page_size": 16,
        "enable_prefix_caching": False,
    }
    assert options_of(args, ServerOptions) == {"api_key": ("a", "b", "c"), "port": 0}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("--max-modle-len", "--max-model-len"), ("--tensor-paralel-size", "--tensor-parallel-size")],
)
def test_a_wrong_flag_names_the_right_one(
    wrong: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", wrong, "1"])
    assert stop.value.code == 2
    assert f"did you mean {right}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--tensor-parallel-size 0", "--page-size 0", "--max-num-seqs 9 --max-num-batched-tokens 8"],
)
def test_impossible_options_are_refused_before_loading(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "/nonexistent", *flags.split()]) == 2
    assert flags.split()[-2].strip("-").replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat --message hello", "generate --prompt hello"])
def test_sampling_is_refused_before_any_weight_is_read(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "/nonexistent", "--temperature", "-1"]) == 1
    assert "temperature" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_is_an_error() -> None:
    event = b'data: {"choices": [{"delta": {"content": "half"}}]}\n'
    assert list(chat._deltas([b": keep-alive\n", event, b"\n", b"data: [DONE]\n"])) == ["half"]
    pieces = chat._deltas([event, b"\n"])
    assert next(pieces) == "half"
    with pytest.raises(TokenSpeedError, match="before the answer was whole"):
        next(pieces)


def test_the_parameters_page_is_up_to_date(repository: Path) -> None:
    page = (repository / "docs" / "parameters.md").read_text()
    assert page == "\n".join(parameters.lines()) + "\n", (
        "run: python -m tokenspeed.cli.parameters > docs/parameters.md"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculative-config", '{"method": "medusa"}'], "unknown method 'medusa'"),
        (["--speculative-config", "{}", "--num-speculative-tokens", "3"], "were both given"),
        (["--num-speculative-tokens", "0"], "num_speculative_tokens must be a number of at least"),
        (
            ["--num-speculative-tokens", "8", "--max-model-len", "8"],
            "num_speculative_tokens 8 must be below max_model_len 8",
        ),
        (["--speculative-model", "x", "-pp", "2"], "draft_model needs pipeline_parallel_size 1"),
    ],
)
def test_wrong_speculation_is_refused_before_loading(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "/nonexistent", *flags]) == 2
    assert message in capsys.readouterr().err
