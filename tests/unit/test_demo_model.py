# SPDX-License-Identifier: MIT
"""The demo model inside the package: its tokenizer, chat template, and the names of its weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

import tokenspeed

DEMO = Path(tokenspeed.__file__).parent / "assets" / "demo"
CONFIG = json.loads((DEMO / "config.json").read_text())
TOKENIZER_CONFIG = json.loads((DEMO / "tokenizer_config.json").read_text())
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
CONTROL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def render(messages: list[dict[str, Any]], **variables: Any) -> str:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(TOKENIZER_CONFIG["chat_template"])
    return template.render(messages=messages, **variables)


@given(st.text())
def test_tokenizer_is_lossless(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["\r\n\t x\n\n\n        y  \n", "é漢字😀\u0301", "def f():\n    return 1"]
)
def test_tokenizer_keeps_white_space_and_scripts(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_an_indented_line_break_is_one_token() -> None:
    for depth in (4, 8, 12):
        tokens = TOKENIZER.encode("x\n" + " " * depth + "return").tokens
        assert len(tokens) == 3


def test_special_tokens_have_the_first_ids() -> None:
    assert [TOKENIZER.token_to_id(t) for t in CONTROL + MARKERS] == list(range(10))
    assert TOKENIZER.get_vocab_size() == CONFIG["vocab_size"]
    text = "".join(CONTROL + MARKERS)
    assert TOKENIZER.encode(text).ids == list(range(10))
    assert TOKENIZER.decode(list(range(10)), skip_special_tokens=True) == "".join(MARKERS)


def test_a_turn_and_a_document_end_generation() -> None:
    generation = json.loads((DEMO / "generation_config.json").read_text())
    ids = [TOKENIZER.token_to_id(t) for t in ("<|end|>", "<|endoftext|>")]
    assert generation["eos_token_id"] == ids
    assert [CONFIG["eos_token_id"], CONFIG["pad_token_id"]] == ids
    assert TOKENIZER_CONFIG["eos_token"] == "<|end|>"


def test_template_renders_every_kind_of_turn() -> None:
    call = {"type": "function", "function": {"name": "ls", "arguments": '{"path": "."}'}}
    parts = [{"type": "text", "text": "List "}, {"type": "text", "text": "."}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "reasoning_content": "ls", "tool_calls": [call]},
        {"role": "tool", "content": "a.py", "tool_call_id": "1"},
        {"role": "assistant", "content": "One file."},
    ]
    assert render(messages) == (
        "<|system|>Be brief.<|end|><|user|>List .<|end|>"
        '<|assistant|><think>ls</think><tool_call>{"name": "ls", "arguments": {"path": "."}}'
        "</tool_call><|end|><|tool|>a.py<|end|><|assistant|>One file.<|end|>"
    )


def test_template_puts_tools_behind_the_system_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "ls"}}]
    text = 'Tools:\n{"type": "function", "function": {"name": "ls"}}<|end|>'
    user = {"role": "user", "content": "Hi"}
    assert render([user], tools=tools) == f"<|system|>{text}<|user|>Hi<|end|>"
    system = {"role": "system", "content": "Be brief."}
    rendered = render([system, user], tools=tools)
    assert rendered == f"<|system|>Be brief.\n\n{text}<|user|>Hi<|end|>"


def test_template_accepts_arguments_as_an_object_and_calls_without_wrapper() -> None:
    call = {"name": "ls", "arguments": {"path": "."}}
    rendered = render([{"role": "assistant", "thinking": "so", "tool_calls": [call]}])
    assert rendered == (
        '<|assistant|><think>so</think><tool_call>{"name": "ls", "arguments": {"path": "."}}'
        "</tool_call><|end|>"
    )


@pytest.mark.parametrize(
    ("variables", "tail"),
    [({}, ""), ({"enable_thinking": False}, ""), ({"enable_thinking": True}, "<think>")],
)
def test_template_opens_the_answer(variables: dict[str, bool], tail: str) -> None:
    rendered = render([{"role": "user", "content": "Hi"}], add_generation_prompt=True, **variables)
    assert rendered == "<|user|>Hi<|end|><|assistant|>" + tail


@pytest.mark.parametrize(
    "message",
    [
        {"role": "pirate", "content": "Arr"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "user", "content": 7},
    ],
)
def test_template_refuses_what_it_does_not_know(message: dict[str, Any]) -> None:
    with pytest.raises(jinja2.TemplateError):
        render([message])


def mlp(prefix: str, inner: int) -> Iterator[tuple[str, list[int]]]:
    hidden = CONFIG["hidden_size"]
    yield f"{prefix}.gate_proj.weight", [inner, hidden]
    yield f"{prefix}.up_proj.weight", [inner, hidden]
    yield f"{prefix}.down_proj.weight", [hidden, inner]


def attention(prefix: str) -> Iterator[tuple[str, list[int]]]:
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    q_rank, kv_rank = CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"]
    nope, rope, value = (CONFIG[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    yield f"{prefix}.q_a_proj.weight", [q_rank, hidden]
    yield f"{prefix}.q_a_layernorm.weight", [q_rank]
    yield f"{prefix}.q_b_proj.weight", [heads * (nope + rope), q_rank]
    yield f"{prefix}.kv_a_proj_with_mqa.weight", [kv_rank + rope, hidden]
    yield f"{prefix}.kv_a_layernorm.weight", [kv_rank]
    yield f"{prefix}.kv_b_proj.weight", [heads * (nope + value), kv_rank]
    yield f"{prefix}.o_proj.weight", [hidden, heads * value]


def layer(index: int) -> Iterator[tuple[str, list[int]]]:
    prefix, hidden, inner = (
        f"model.layers.{index}",
        CONFIG["hidden_size"],
        CONFIG["moe_intermediate_size"],
    )
    yield f"{prefix}.input_layernorm.weight", [hidden]
    yield f"{prefix}.post_attention_layernorm.weight", [hidden]
    yield from attention(f"{prefix}.self_attn")
    if index < CONFIG["first_k_dense_replace"]:
        yield from mlp(f"{prefix}.mlp", CONFIG["intermediate_size"])
        return
    experts = CONFIG["n_routed_experts"]
    yield f"{prefix}.mlp.gate.weight", [experts, hidden]
    yield f"{prefix}.mlp.gate.e_score_correction_bias", [experts]
    for expert in range(experts):
        yield from mlp(f"{prefix}.mlp.experts.{expert}", inner)
    yield from mlp(f"{prefix}.mlp.shared_experts", inner * CONFIG["n_shared_experts"])


def all_tensors() -> Iterator[tuple[str, list[int]]]:
    hidden, layers = CONFIG["hidden_size"], CONFIG["num_hidden_layers"]
    yield "model.embed_tokens.weight", [CONFIG["vocab_size"], hidden]  # the head is tied to it
    yield "model.norm.weight", [hidden]
    for index in range(layers + CONFIG["num_nextn_predict_layers"]):
        yield from layer(index)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"model.layers.{layers}.{norm}.weight", [hidden]
    yield f"model.layers.{layers}.eh_proj.weight", [hidden, 2 * hidden]


def test_tensors_are_those_that_the_config_implies() -> None:
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in shapes if "bias" not in name}
    assert shapes == dict(all_tensors())
    assert types == {"BF16"}


def test_the_weights_fit_their_limit() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 16_000_000
