# SPDX-License-Identifier: MIT
"""Specifications from clients: what is refused, what the other process survives, what is kept."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from tokenspeed.engine.messages import AddGrammar, DropGrammar
from tokenspeed.errors import RequestError
from tokenspeed.execution.grammars import (
    VOCABULARY,
    GrammarState,
    pack_vocabulary,
    tokenizer_info,
)
from tokenspeed.execution.sampling_params import Grammar
from tokenspeed.text.ebnf import in_json_string, with_little_space, with_tokens
from tokenspeed.text.grammar import (
    MAX_WAITING_EACH,
    NUM_FORKS,
    GrammarCompiler,
    GrammarMirror,
    GrammarSpec,
)
from tokenspeed.text.grammar_worker import compile_spec
from tokenspeed.text.json_schema import MAX_BYTES, check_size, narrowed
from tokenspeed.text.output_format import content_tag, structured_outputs
from tokenspeed.text.regexes import check_regex
from tokenspeed.text.regexes import in_json_string as escaped
from tokenspeed.text.tokenizer import Tokenizer

xgrammar = pytest.importorskip("xgrammar")

VOCAB_SIZE = 300
HANGS_S = 30.0  # what grows as a square of its input takes much longer


def byte_tokenizer() -> Tokenizer:
    """256 bytes, then `<end>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = FastTokenizer(models.BPE({char: i for i, char in enumerate(letters)}, []))
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens([AddedToken("<end>")])
    return Tokenizer(inner, eos_ids=(256,))


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(
        byte_tokenizer(), VOCAB_SIZE, cpu_limit_s=1.0, wall_limit_s=8.0, cache_bytes=1 << 20
    )
    yield made
    made.close()


def spec(**given: Any) -> GrammarSpec:
    """Of vLLM's words."""
    output = structured_outputs(given)
    assert output is not None
    return GrammarSpec(content_tag(output, "field", {}), field="field")


def fits(compiler: GrammarCompiler, asked: GrammarSpec, text: str) -> bool:
    grammar = compiler.compile(asked)
    info = tokenizer_info(grammar.vocabulary)
    tokenizer = byte_tokenizer()
    held = xgrammar.CompiledGrammar.deserialize_json(grammar.data.decode(), info)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return GrammarState(held, [256], ids).complete


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        ({"json_object": True}, ['{"a": [1, null]}', "{}"], ["[]", '{"a": 01}', ""]),
        ({"regex": "[ab]{2}c?"}, ["ab", "bac"], ["a", "abcc"]),
        ({"choice": ["yes", "no"]}, ["yes", "no"], ["y", "yesno"]),
        ({"grammar": 'root ::= "é" | "x" root'}, ["é", "xxé"], ["x"]),
        ({"grammar": "start: /[a-c]+/ NL\nNL: /\\n/"}, ["abc\n"], ["abc"]),
        ({"json": {"enum": [1, "a\\"]}}, ["1", '"a\\\\"'], ["2"]),
        ({"json": '{"const": null}'}, ["null"], ["1"]),
        ({"json": {"type": "integer", "enum": [1, "a", True]}}, ["1"], ['"a"', "true"]),
        ({"json": {"minimum": 3}}, ["4"], ["2", '"a"']),
        ({"json": {"type": "string", "pattern": 'a"\\\\\\n'}}, ['"a\\"\\\\\\n"'], ['"a"\\n"']),
        ({"json": {"type": "array", "minItems": 1}}, ['["x"]'], ["[]"]),
        (
            {"json": {"type": "object", "required": ["a"]}},
            ['{"a": {"b": 1}}'],
            ["{}"],
        ),
        (
            {
                "json": {
                    "$ref": "#/$defs/n",
                    "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
                }
            },
            ["[]", "[[],[[]]]"],
            ["[1]"],
        ),
        (
            {
                "json": {
                    "type": "object",
                    "anyOf": [{"required": ["a"], "properties": {"a": {"type": "null"}}}],
                }
            },
            ['{"a":null}'],
            ["{}"],
        ),
    ],
)
def test_what_fits(
    compiler: GrammarCompiler, given: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    asked = spec(**given)
    assert [text for text in good if not fits(compiler, asked, text)] == []
    assert [text for text in bad if fits(compiler, asked, text)] == []


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        made = {"type": "array", "items": made}
    return made


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"regex": "(" * 30_000 + ")" * 30_000}, "grammar_limit"),
        ({"regex": "(" * 2000 + ")" * 2000}, "grammar_limit"),
        ({"regex": "a{1000000}"}, "grammar_limit"),
        ({"regex": "((a{90}){90}){90}"}, "grammar_limit"),
        ({"regex": ""}, "invalid_value"),
        ({"regex": "(a"}, "invalid_grammar"),
        ({"regex": "(?=a)b"}, "invalid_grammar"),
        ({"grammar": "root ::= " + "(" * 30_000}, "invalid_grammar"),
        ({"grammar": "start: other"}, "invalid_grammar"),
        ({"grammar": "x" * (MAX_BYTES + 1)}, "grammar_limit"),
        ({"json": nested(100)}, "grammar_limit"),
        ({"json": {"description": "x" * MAX_BYTES}}, "grammar_limit"),
        ({"json": {"type": "string", "minLength": float("nan")}}, "invalid_grammar"),
        ({"json": {"$ref": "#/$defs/none"}}, "invalid_grammar"),
        ({"json": {"$ref": "#"}}, "invalid_grammar"),
        ({"json": {"$ref": "https://example.org/schema"}}, "invalid_grammar"),
        ({"json": {"type": "integer", "not": {"const": 1}}}, "invalid_grammar"),
        ({"json": {"type": "array", "uniqueItems": True}}, "invalid_grammar"),
        ({"json": {"if": {}, "then": {}}}, "invalid_grammar"),
        ({"json": {"allOf": [{"type": "integer"}, {"minimum": 3}]}}, "invalid_grammar"),
        ({"json": {"anyOf": [{}], "minimum": 3}}, "invalid_grammar"),
        ({"json": {"properties": [], "type": "object"}}, "invalid_grammar"),
        ({"json": {"items": 3}}, "invalid_grammar"),
        ({"json": {"type": "strin"}}, "invalid_grammar"),
        ({"json": "{"}, "invalid_grammar"),
        ({"choice": []}, "invalid_value"),
        ({"choice": [1]}, "invalid_value"),
        ({"choice": ["a"] * 10_001}, "grammar_limit"),
        ({"structural_tag": {"format": {"type": "nothing"}}}, "invalid_grammar"),
        ({"structural_tag": {"format": {"type": "foreign"}}}, "invalid_value"),
        ({"structural_tag": {"format": {"type": "token", "token": "<no>"}}}, "invalid_value"),
        ({"structural_tag": []}, "invalid_value"),
        ({"regex": "a", "choice": ["b"]}, "invalid_value"),
        ({"whitespace_pattern": " "}, "unsupported_parameter"),
    ],
)
def test_what_is_refused(compiler: GrammarCompiler, given: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(spec(**given))
    assert caught.value.code == code
    assert len(str(caught.value)) < 700


def test_what_never_ends_costs_its_own_request(compiler: GrammarCompiler) -> None:
    properties = {f"a{i}": {"type": "integer"} for i in range(4000)}
    slow = spec(json={"type": "object", "properties": properties})
    waiting = compiler.submit(slow)
    assert fits(compiler, spec(choice=["a"]), "a")  # meanwhile, in another fork
    with pytest.raises(RequestError) as caught:
        waiting.result()
    assert caught.value.code == "grammar_limit"
    assert fits(compiler, spec(choice=["b"]), "b")


def test_what_nobody_waits_for_holds_up_nobody() -> None:
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, cpu_limit_s=300.0, wall_limit_s=600.0)
    try:
        slow = []
        for number in range(NUM_FORKS + 2):  # more than are compiled at once
            properties = {f"{number}a{i}": {"type": "integer"} for i in range(4000)}
            slow.append(made.submit(spec(json={"type": "object", "properties": properties})))
        for future in slow:
            made.abandon(future)
        assert all(future.cancelled() for future in slow)
        assert fits(made, spec(choice=["a"]), "a")
        again = made.submit(spec(choice=["b"]))
        made.abandon(again)
        assert made.compile(spec(choice=["b"])).data
    finally:
        made.close()


def test_a_grammar_abandoned_as_it_becomes_ready() -> None:
    """The process learns of the answer and that nobody wants it at once, in either order."""
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE)
    try:
        made.compile(spec(choice=["a"]))
        assert made._child is not None
        properties = {f"a{i}": {"type": "integer"} for i in range(100)}
        waiting = made.submit(spec(json={"type": "object", "properties": properties}))
        time.sleep(0.05)  # the fork is at it: 0.3 s of work
        os.kill(made._child.pid, signal.SIGSTOP)
        made.abandon(waiting)
        time.sleep(1.5)  # and answers meanwhile
        os.kill(made._child.pid, signal.SIGCONT)
        assert made.compile(spec(choice=["c"])).data
    finally:
        made.close()


def test_owners_take_turns() -> None:
    """What one owner piles up holds up no other for longer than what is at work."""
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE)
    order: list[str] = []
    try:
        jobs = []
        for owner, count in (("many", 12), ("few", 2)):
            for number in range(count):
                future = made.submit(spec(choice=[f"{owner}{number}"]), owner)
                future.add_done_callback(lambda _, owner=owner: order.append(owner))
                jobs.append(future)
        for future in jobs:
            assert future.result().data
        assert order.index("few") < 6
        assert order[-1] == "many"
        choices = [
            spec(choice=["x" * 500 + str(number)]) for number in range(MAX_WAITING_EACH + 12)
        ]
        with pytest.raises(RequestError, match="too many grammars"):
            list(map(made.submit, choices, ["many"] * len(choices)))
        assert made.submit(spec(choice=["y"]), "few").result().data
    finally:
        made.close()


def test_a_cancelled_future_costs_nobody_else() -> None:
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE)
    try:
        assert made.submit(spec(choice=["a"])).cancel()
        assert made.compile(spec(choice=["b"])).data
    finally:
        made.close()


def test_what_takes_long_to_follow_is_refused() -> None:
    tokens = [bytes([97 + n % 26]) * (1 + n // 26) for n in range(5000)]
    info = tokenizer_info(pack_vocabulary([*tokens, b""], [5000]))
    with pytest.raises(TimeoutError, match="too long to follow"):
        compile_spec({"format": {"type": "regex", "pattern": "(.?){4000}b"}, "tokens": {}}, info)


def test_a_dead_process_is_started_again() -> None:
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE)
    try:
        first = made.compile(spec(choice=["a"]))
        child = made._child
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert made.compile(spec(choice=["a"])) is first  # kept here
        assert made.compile(spec(choice=["b"])).data
    finally:
        made.close()


def test_what_is_kept_is_bounded(compiler: GrammarCompiler) -> None:
    sent: list[AddGrammar | DropGrammar] = []

    def send(message: AddGrammar | DropGrammar) -> bool:
        sent.append(message)
        return True

    mirror = GrammarMirror(send)
    for i in range(120):
        assert mirror.provide(compiler.compile(spec(regex=f"[a-z]{{{i % 40 + 1}}}{i}[0-9]+")))
        assert compiler.num_bytes <= 1 << 20
    gc.collect()
    mirror.sweep()
    added = {message.key: message for message in sent if isinstance(message, AddGrammar)}
    dropped = {message.key for message in sent if isinstance(message, DropGrammar)}
    assert len(added) == 121
    assert next(iter(added)) == VOCABULARY
    held = [message for key, message in added.items() if key not in dropped]
    assert dropped
    assert sum(len(message.data) for message in held[1:]) <= 1 << 20


def test_the_engine_forgets_what_nobody_can_name(compiler: GrammarCompiler) -> None:
    listening = True
    sent: list[AddGrammar | DropGrammar] = []

    def send(message: AddGrammar | DropGrammar) -> bool:
        sent.extend([message] if listening else [])
        return listening

    mirror = GrammarMirror(send)
    grammar = compiler.compile(spec(choice=["only", "here"]))
    assert compiler.compile(spec(choice=["only", "here"])) is grammar
    listening = False
    assert not mirror.provide(grammar)
    listening = True
    assert mirror.provide(grammar)
    assert mirror.provide(grammar)
    assert [type(message) for message in sent] == [AddGrammar, AddGrammar]
    assert mirror.provide(Grammar("another's"))  # the engine will refuse it
    key = grammar.key
    compiler._recent.clear()
    compiler._recent_bytes = 0
    listening = False
    del grammar
    mirror.sweep()
    assert len(sent) == 2
    listening = True
    mirror.sweep()
    assert sent[2:] == [DropGrammar(key)]


def test_regexes() -> None:
    for pattern in ("a" * 4096, "(a|b)*[(((]{3}", r"\(\(\(", "a{,3}", "(" * 60 + ")" * 60, "]{"):
        assert check_regex(pattern, "field") == pattern
    for pattern in ("a" * 4097, "(" * 70, "(a{200}){200}", "(a{150,}){150}", "((a+){100}b?){100}"):
        with pytest.raises(RequestError):
            check_regex(pattern, "field")
    start = time.perf_counter()
    check_regex("[a" * 2048, "field")
    check_regex("(a*)*" * 800, "field")
    assert time.perf_counter() - start < HANGS_S
    assert escaped('a"[\\"]\\\\n\\n') == 'a\\\\"[\\"]\\\\\\\\n\\\\n'


def test_schemas_are_narrowed_in_time_that_is_linear() -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    start = time.perf_counter()
    assert narrowed(wide, "field") == wide
    assert time.perf_counter() - start < HANGS_S
    assert narrowed(True, "field") is True
    kept = {"default": {"not": 1}, "examples": [{"$ref": "x"}], "enum": [{"if": 1}]}
    assert narrowed(kept, "field") == kept  # values are no schemas
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError):
        check_size(deep, "field")
    while deep:  # taken apart, so that its end does not recurse either
        deep = deep[0]


def test_ebnf_inside_other_text() -> None:
    grammar = 'root ::= "a\\"\\n" [^b] sub{1,2}\nsub ::= ("x" | root)\n'
    quoted = in_json_string(grammar)
    held = xgrammar.Grammar.from_ebnf(quoted)
    info = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)], stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(held)
    for text, good in [('a"\nc', False), ('a"\n\\x', True), ('a"\n"x', True), ('a"\nbx', False)]:
        matcher = xgrammar.GrammarMatcher(compiled)
        assert (matcher.accept_string(json.dumps(text)) and matcher.is_completed()) == good
    tokens = with_tokens('root ::= "<k>a</k>" "<" [<k>] excludes=("</k>")', {"<k>": 7, "</k>": 8})
    assert tokens == 'root ::= Token(7) "a" Token(8) "<" [<k>] excludes=("</k>")'
    gap = "[ \\n\\r\\t]*"
    narrow = with_little_space(f'root ::= (("a" {gap} "b")) (=({gap} "c"))')
    assert narrow.startswith(f'root ::= (("a" json_space "b")) (=({gap} "c"))\n')


def test_nothing_is_imported_without_a_grammar() -> None:
    code = (
        "import sys; import tokenspeed.llm, tokenspeed.gateway.server, tokenspeed.engine.build;"
        " sys.exit('xgrammar' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_without_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE)
    with pytest.raises(RequestError, match="xgrammar, which is not installed") as caught:
        made.compile(spec(choice=["a"]))
    assert caught.value.code == "unsupported_parameter"


def test_a_closed_compiler_starts_no_process() -> None:
    made = GrammarCompiler(byte_tokenizer(), VOCAB_SIZE)
    made.close()
    with pytest.raises(RequestError, match="closing"):
        made.compile(spec(choice=["a"]))
    assert made._child is None
