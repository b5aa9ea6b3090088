# SPDX-License-Identifier: MIT
"""What reading answers costs: microseconds a token, and whether time is linear in the text.

For each format an answer of reasoning, content and calls is read in pieces of four characters, at
lengths from 8 KiB to 128 KiB. `t(2n)/t(n)`, in CPU time: a text of n is read before and after one
of 2n, so that both have the same minute of the machine; the median of such triples, and of all
lengths the worst. `--bfcl` (a folder with BFCL's data, which the `bfcl-eval` wheel carries)
writes the calls that answer its questions in every format and reads them back.

    python benchmarks/parsers.py --json benchmarks/results/parsers.json
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.unit.parser_cases import WRITERS, Call, Said, expected, parse, steps_of, with_calls
from tokenspeed.text.channels import Format, Inputs, Piece
from tokenspeed.text.conversation import Tool
from tokenspeed.text.parsers import FORMATS

SIZES = tuple(2**n * 1024 for n in range(3, 8))
PIECE = 4  # characters, about a token's
EDIT = Tool(
    "edit_file",
    parameters={
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "line": {"type": "integer"},
        },
    },
)
CODE = 'if a < b and "x" in y:\n    return f"<{a}>"  # ünïcode\n'

_HOSTILE = {"markup": '{markers} {{"name": "f", "a": "\\', "spaces": " \n", "nested": '[{{"a":('}


def answer(format_: Format, kind: str, size: int) -> str:
    """About `size` characters: content, one call with long text, many calls, or what is none."""
    writer = WRITERS[format_.name]
    if kind in _HOSTILE:
        start = "".join(format_.markers)
        part = _HOSTILE[kind].format(markers=start)
        return start + part * max(1, size // len(part))
    if kind == "content":
        return writer.write(Said("", (CODE * (size // len(CODE)),)))
    body = {"path": "src/a.py", "text": CODE * (size // len(CODE)), "line": 7}
    if kind == "call":
        return writer.write(Said("", (Call(EDIT.name, body),), (EDIT,)))
    small = Call(EDIT.name, {"path": "a.py", "text": CODE, "line": 3})
    number = max(1, size // len(writer.write(Said("", (small,), (EDIT,)))))
    return writer.write(Said("", (small,) * (number if writer.parallel else 1), (EDIT,)))


def calls_in(name: str) -> bool:
    """Whether the format can write calls at all."""
    return WRITERS[name].fits(Said("", (Call(EDIT.name, {}),), (EDIT,)))


def seconds(format_: Format, steps: Sequence[Sequence[Piece]]) -> float:
    """The CPU time of reading these steps."""
    parser = format_.make(Inputs(WRITERS[format_.name].starts_in, (EDIT,), frozenset()))
    start = time.thread_time()
    for step in steps:
        parser.push(step)
    parser.finish()
    return time.thread_time() - start


def growth(format_: Format, texts: Sequence[str], piece: int, rounds: int) -> tuple[float, float]:
    """The best time of a step, and the worst ratio of a text's time to that of the
    one before, which is half as long. In pieces of so many characters, one a step."""
    made = [[[Piece(t[i : i + piece])] for i in range(0, len(t), piece)] for t in texts]
    gc.collect()
    gc.freeze()  # the steps are no work of the parser's
    best, worst = float("inf"), 0.0
    for half, whole in pairwise(made):
        ratios = []
        for _ in range(rounds * min(8, len(made[-1]) // len(whole))):
            before, long, after = (seconds(format_, steps) for steps in (half, whole, half))
            ratios.append(2 * long / (before + after) * 2 * len(half) / len(whole))
            best = min(best, long / len(whole))
        worst = max(worst, median(ratios))
    gc.unfreeze()
    return best, worst


def measure(format_: Format, kind: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Microseconds a piece, and the worst growth from one length to twice it."""
    texts = [answer(format_, kind, size) for size in sizes]
    best, worst = growth(format_, texts, PIECE, rounds)
    alone, worst_alone = growth(format_, texts, 1, rounds)
    return {
        "format": format_.name,
        "kind": kind,
        "us_per_piece": round(best * 1e6, 3),
        "us_per_character_alone": round(alone * 1e6, 3),
        "worst_ratio": round(max(worst, worst_alone), 3),
    }


def bfcl(folder: Path) -> Iterator[tuple[tuple[Tool, ...], tuple[Call, ...]]]:
    """Tools and the calls that answer a question, from BFCL's files of questions and answers."""
    for answers in sorted(folder.rglob("possible_answer/*.json")):
        questions = answers.parents[1] / answers.name
        if not questions.is_file():
            continue
        asked = {line["id"]: line for line in map(json.loads, questions.open(encoding="utf-8"))}
        for line in map(json.loads, answers.open(encoding="utf-8")):
            functions = asked.get(line["id"], {}).get("function", [])
            truth = line["ground_truth"]
            if not all(isinstance(call, dict) for call in truth):
                continue  # several turns, in Python's syntax
            tools = [Tool(f["name"], parameters=f["parameters"]) for f in functions]
            yield (
                tuple(tools),
                tuple(Call(*_first_choice(call)) for call in truth),
            )


def _first_choice(call: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A call of the first of the values that count as right; an empty one may be left out."""
    name, arguments = next(iter(call.items()))
    given = {key: values[0] for key, values in arguments.items() if values}
    return name, {key: value for key, value in given.items() if value != ""}


def check_bfcl(folder: Path) -> dict[str, Any]:
    """How many calls of BFCL each format gives back as they were written."""
    cases = list(bfcl(folder))
    wrong: dict[str, int] = {}
    read = 0
    for name, format_ in FORMATS.items():
        writer = WRITERS[name]
        for tools, calls in cases:
            said = Said("", calls[:1] if not writer.parallel else calls, tools)
            if not writer.fits(said):
                continue
            text = writer.write(said)
            steps = steps_of(text, range(0, len(text), PIECE))
            events = parse(format_, Inputs(writer.starts_in, tools, frozenset()), steps)
            read += len(said.calls)
            wrong[name] = wrong.get(name, 0) + (with_calls(events) != expected(said))
    return {"questions": len(cases), "calls_read": read, "questions_wrong": wrong}


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    cli.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--bfcl", type=Path, help="a folder with BFCL's data")
    cli.add_argument("--json", type=Path, help="write the result here too")
    options = cli.parse_args()
    rows = []
    print(f"{'format':14} {'answer':8} {'us/4 chars':>11} {'us/char alone':>14} {'t(2n)/t(n)':>11}")
    for name in options.formats:
        for kind in ("content", "call", "calls", *_HOSTILE):
            if kind in ("call", "calls") and not calls_in(name):
                continue
            row = measure(FORMATS[name], kind, SIZES, options.rounds)
            rows.append(row)
            costs = f"{row['us_per_piece']:11.2f} {row['us_per_character_alone']:14.2f}"
            print(f"{name:14} {kind:8} {costs} {row['worst_ratio']:11.2f}", flush=True)
    result: dict[str, Any] = {"benchmark": "parsers", "largest": SIZES[-1], "rows": rows}
    if options.bfcl:
        result["bfcl"] = check_bfcl(options.bfcl)
        print(f"BFCL: {result['bfcl']}")
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
