# SPDX-License-Identifier: MIT
"""BFCL's tools through grammars and parsers: what is forced, is it allowed, and read back?

For every question of BFCL (`--data`: a folder with the data that the `bfcl-eval` wheel carries) a
grammar that forces calls of the question's tools is compiled, the right calls are followed through
it token by token, and what was allowed is parsed. Schemas that cannot be enforced as they stand
("type": "any") fall back to any object, as the server does. Prints a table and one line of JSON.

    pip download --no-deps bfcl-eval && unzip -q bfcl_eval-*.whl -d bfcl
    python benchmarks/bfcl.py --data bfcl [--limit 500]
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parsers import bfcl

from tests.unit.parser_cases import Call
from tokenspeed.errors import RequestError
from tokenspeed.execution.grammars import GrammarState, GrammarStore
from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.text.answer_grammar import AnswerGrammar
from tokenspeed.text.call_syntax import SYNTAXES
from tokenspeed.text.channels import CallArguments, CallStart, Event, Inputs
from tokenspeed.text.conversation import Tool, ToolChoice
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.grammar import GrammarCompiler
from tokenspeed.text.parsers import FORMATS
from tokenspeed.text.tokenizer import Tokenizer

NAME = "hermes"  # the demo's own format, whose markers its vocabulary has


class Check:
    """One model's grammars, parser and tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
        added = {text: token for token, text in self.tokenizer.added_tokens.items()}
        self.answers = AnswerGrammar(FORMATS[NAME], added)
        self.compiler = GrammarCompiler(self.tokenizer, self.tokenizer.vocab_size)
        self.store = GrammarStore()
        self.store.take([("", self.compiler.vocabulary())])

    def question(self, tools: tuple[Tool, ...], calls: tuple[Call, ...]) -> str:
        """What became of it: `strict` or `loose` if all was well, else what was not."""
        for loose in (False, True):
            try:
                spec = self.answers.spec(tools, ToolChoice("required"), loose=loose)
                if spec is None:
                    return "no grammar"
                grammar = self.compiler.compile(spec)
            except RequestError:
                continue
            found = self.follow(grammar.key, grammar.data, tools, calls)
            if found == "allowed":
                return "loose" if loose else "strict"
            if loose:
                return found
        return "refused"

    def follow(
        self, key: str, data: bytes, tools: tuple[Tool, ...], calls: tuple[Call, ...]
    ) -> str:
        """The right calls, token by token."""
        self.store.take([(key, data)])
        state = GrammarState(self.store.get(key), list(self.tokenizer.eos_ids), [])
        self.store.take([(key, None)])
        ids = self.tokenizer.encode(written(calls), add_special_tokens=False)
        if not all(state.offer(token) for token in ids) or not state.complete:
            return "not allowed"
        shown = frozenset(FORMATS[NAME].markers)
        detokenizer = Detokenizer(self.tokenizer, shown=shown)
        inputs = Inputs("content", tools, shown & set(self.tokenizer.added_tokens.values()))
        parser = FORMATS[NAME].make(inputs)
        events = [event for token in ids for event in parser.push(detokenizer.pieces(token))]
        return "allowed" if read(events + parser.finish()) == list(calls) else "read otherwise"


def written(calls: tuple[Call, ...]) -> str:
    """Calls as the format's models write them."""
    syntax = SYNTAXES[NAME]
    texts = [
        f"{syntax.prefix}{call.name}{syntax.suffix}{json.dumps(call.arguments)}{syntax.tail}"
        for call in calls
    ]
    return syntax.trigger + syntax.opening + (syntax.between or "").join(texts) + syntax.closing


def read(events: list[Event]) -> list[Call]:
    """The calls of a parsed answer."""
    names = [event.name for event in events if isinstance(event, CallStart)]
    arguments: list[str] = []
    for event in events:
        if isinstance(event, CallStart):
            arguments.append("")
        elif isinstance(event, CallArguments):
            arguments[-1] += event.text
    return [Call(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def main() -> None:
    cli = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cli.add_argument("--data", type=Path, required=True)
    cli.add_argument("--limit", type=int, help="questions, of each kind as many")
    options = cli.parse_args()
    cases = list(bfcl(options.data))
    if options.limit:
        cases = cases[:: max(1, len(cases) // options.limit)]
    check, found, begin = Check(), Counter[str](), time.perf_counter()
    for tools, calls in cases:
        found[check.question(tools, calls)] += 1
    check.compiler.close()
    seconds = time.perf_counter() - begin
    for what, count in found.most_common():
        print(f"{what:16}{count:7}")
    result: dict[str, Any] = {"benchmark": "bfcl", "format": NAME, "questions": len(cases)}
    print(json.dumps(result | {"found": dict(found), "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
