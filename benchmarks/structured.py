# SPDX-License-Identifier: MIT
"""Structured output: what a grammar costs a batch, and what many schemas leave in memory.

    python -m benchmarks.structured [--model demo] [--batch 8] [--tokens 256] [--schemas 2000]

Throughput: the same prompts with a grammar that every token must pass and without one, alternating,
medians of rounds; both give as many tokens. Memory: unique schemas through the compiler and into an
engine's store, one after the other; resident bytes of this process and of those that compile, with
a compiler that keeps `--cache-mib`. Prints a table, then one line of JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import psutil  # type: ignore[import-untyped]

from tokenspeed import LLM, SamplingParams
from tokenspeed.engine.messages import AddGrammar, DropGrammar
from tokenspeed.execution.grammars import GrammarStore
from tokenspeed.text.grammar import GrammarCompiler, GrammarMirror, GrammarSpec

MIB = 1 << 20
PROMPT = "Write a long story about number {}:\n"
# Text whose every token must be looked up; it ends with what hardly any model says.
ENDLESS = {"regex": r"([A-Za-z0-9 .,;:'()_=+\-\n]|\"[^\"]*\")*\x01"}


def generate(
    llm: LLM, batch: int, tokens: int, asked: dict[str, Any] | None
) -> tuple[float, float]:
    """Tokens of one batch per second, and per second of this process's CPUs."""
    params = SamplingParams(
        max_tokens=tokens, ignore_eos=True, temperature=0.8, seed=1, structured_outputs=asked
    )
    start, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate([PROMPT.format(i) for i in range(batch)], params, use_tqdm=False)
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    return made / (time.perf_counter() - start), made / (time.process_time() - cpu)


def throughput(llm: LLM, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians with and without, and of the rounds' shares; that of CPU time is what holds on a
    machine that others use."""
    for asked in (None, ENDLESS):
        generate(llm, batch, tokens, asked)
    pairs = [
        (generate(llm, batch, tokens, None), generate(llm, batch, tokens, ENDLESS))
        for _ in range(rounds)
    ]
    return {
        "tokens_per_s_free": round(statistics.median(free[0] for free, _ in pairs), 1),
        "tokens_per_s_grammar": round(statistics.median(bound[0] for _, bound in pairs), 1),
        "share": round(statistics.median(bound[0] / free[0] for free, bound in pairs), 4),
        "share_per_cpu_s": round(statistics.median(bound[1] / free[1] for free, bound in pairs), 4),
    }


def resident() -> tuple[float, float]:
    """MiB of this process and of its children."""
    me = psutil.Process()
    children = [child.memory_info().rss for child in me.children(recursive=True)]
    return me.memory_info().rss / MIB, sum(children) / MIB


def schema(i: int) -> dict[str, Any]:
    """The i-th unique one."""
    names = (f"field_{i}", f"kind_{i % 97}", "tags")
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 5 + i % 20},
        {"enum": [f"a{i}", f"b{i}"]},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 1 + i % 5},
    ]
    properties = dict(zip(names, kinds, strict=True))
    return {"type": "object", "properties": properties, "required": list(names)}


def memory(llm: LLM, count: int, cache_bytes: int) -> dict[str, Any]:
    """What `count` schemas leave behind."""
    tokenizer = llm.get_tokenizer()
    compiler = GrammarCompiler(
        tokenizer, tokenizer.vocab_size, cache_bytes=cache_bytes, cpu_limit_s=60.0
    )
    store = GrammarStore()
    held: dict[str, int] = {}

    def send(message: AddGrammar | DropGrammar) -> bool:
        if isinstance(message, AddGrammar):
            held[message.key] = len(message.data)
            store.take([(message.key, message.data)])
        else:
            del held[message.key]
            store.take([(message.key, None)])
        return True

    mirror = GrammarMirror(send)
    marks: list[tuple[int, float, float]] = []
    start = time.perf_counter()
    for i in range(count):
        grammar = compiler.compile(GrammarSpec({"type": "json_schema", "json_schema": schema(i)}))
        mirror.provide(grammar)
        store.get(grammar.key)
        del grammar
        if (i + 1) % max(count // 8, 1) == 0:
            marks.append((i + 1, *resident()))
    seconds = time.perf_counter() - start
    compiler.close()
    return {
        "schemas": count,
        "ms_each": round(seconds / count * 1e3, 3),
        "cache_mib": cache_bytes / MIB,
        "kept_mib": round(compiler.num_bytes / MIB, 1),
        "engine_mib": round(sum(held.values()) / MIB, 1),
        "resident_mib": [[n, round(own, 1), round(others, 1)] for n, own, others in marks],
    }


def main() -> None:
    """Runs both and prints them."""
    parser = argparse.ArgumentParser(prog="benchmarks.structured")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schemas", type=int, default=2000)
    parser.add_argument("--cache-mib", type=int, default=32)
    given = parser.parse_args()
    with LLM(given.model, speculative_config='{"method": "off"}') as llm:
        speed = throughput(llm, given.batch, given.tokens, given.rounds)
        print(f"{'batch':>7}{'free tok/s':>13}{'grammar tok/s':>15}{'share':>9}{'of CPU':>9}")
        print(
            f"{given.batch:>7}{speed['tokens_per_s_free']:>13}"
            f"{speed['tokens_per_s_grammar']:>15}{speed['share']:>9}"
            f"{speed['share_per_cpu_s']:>9}"
        )
        found = memory(llm, given.schemas, given.cache_mib * MIB)
        print(f"\n{'schemas':>9}{'this MiB':>11}{'compiling MiB':>15}")
        for count, own, others in found["resident_mib"]:
            print(f"{count:>9}{own:>11}{others:>15}")
    print(json.dumps({"batch": given.batch, **speed, **found}))


if __name__ == "__main__":
    main()
