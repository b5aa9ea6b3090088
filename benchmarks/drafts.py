# SPDX-License-Identifier: MIT
"""What token drafters cost, through their Python door: time per token and per proposal, and memory.

Texts: this project's Python sources, cut into words; random ids; one id that a last one breaks.
Prompt: `add` of the whole text. Token: `extend` by one. Proposal: of 8 ids, after every one of
those tokens. Turn: `add` of the text that goes on with 500 tokens, right after `remove` (the
suffix drafter keeps the history). Drafts whatever comes: says nothing of acceptance.

    python benchmarks/drafts.py [--sizes 1000 10000 100000] [--clock wall|cpu]
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenspeed import _drafts
from tokenspeed.execution.speculation.drafter import TokenDrafter
from tokenspeed.execution.speculation.ngram import NgramDrafter
from tokenspeed.execution.speculation.suffix import SuffixDrafter

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
NEW_TOKENS = 500
DEPTH = 8
Ids = NDArray[np.int32]


def source_words(length: int) -> Ids:
    files = sorted((Path(__file__).parents[1] / "tokenspeed").rglob("*.py"))
    text = "\n".join(path.read_text() for path in files)
    known: dict[str, int] = {}
    words = re.findall(r"\w+|\s+|[^\w\s]", text)[:length]
    if len(words) < length:
        raise ValueError(f"the sources have only {len(words)} words")
    return np.array([known.setdefault(word, len(known)) for word in words], np.int32)


def texts(size: int) -> Iterator[tuple[str, Ids]]:
    length = size + NEW_TOKENS
    yield "sources", source_words(length)
    yield "random", np.random.default_rng(0).integers(0, 150_000, length, dtype=np.int32)
    broken = np.full(length, 7, np.int32)
    broken[size - 1] = 8
    yield "one id", broken


def measure(make: Callable[[], TokenDrafter], text: Ids, clock: Callable[[], float]) -> list[float]:
    """Microseconds per prompt token, token, proposal; milliseconds of the next turn."""
    drafter = make()
    prompt, new = text[:-NEW_TOKENS], np.split(text[-NEW_TOKENS:], NEW_TOKENS)
    one, count = np.zeros(1, np.uint64), np.ones(1, np.int32)
    start = clock()
    drafter.add(0, prompt, b"")
    added = clock() - start
    extending = proposing = 0.0
    for token in new:
        start = clock()
        drafter.extend(one, count, token)
        extended = clock()
        drafter.propose(0, DEPTH)
        proposing += clock() - extended
        extending += extended - start
    drafter.remove(0)
    start = clock()
    drafter.add(1, np.concatenate([text, text[:NEW_TOKENS]]), b"")
    turn = clock() - start
    each = [1e6 * s / n for s, n in ((added, len(prompt)), (extending, len(new)))]
    return [*each, 1e6 * proposing / len(new), 1e3 * turn]


def bytes_per_token(name: str, text: Ids) -> float:
    drafter: _drafts.NgramDrafter | _drafts.SuffixDrafter
    if name == "ngram":
        drafter = _drafts.NgramDrafter(5, 5)
        drafter.add(0, text)
    else:
        drafter = _drafts.SuffixDrafter(1, 0, 0)
        drafter.add(0, text, b"")
    return drafter.num_bytes / drafter.num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    args = parser.parse_args()
    columns = ("prompt us/token", "us/token", "us/proposal", "next turn ms", "bytes/token")
    print(f"{'drafter':8}{'text':9}{'tokens':>8}" + "".join(f"{c:>17}" for c in columns))
    makers: list[Callable[[], TokenDrafter]] = [
        lambda: NgramDrafter(2, 5),
        lambda: SuffixDrafter(2, 1 << 20),
    ]
    rows = []
    for size in args.sizes:
        for kind, text in texts(size):
            for make in makers:
                name = make().name
                numbers = measure(make, text, CLOCKS[args.clock])
                numbers.append(bytes_per_token(name, text[:size]))
                print(f"{name:8}{kind:9}{size:8}" + "".join(f"{n:17.3f}" for n in numbers))
                values = {c: round(n, 3) for c, n in zip(columns, numbers, strict=True)}
                rows.append({"drafter": name, "text": kind, "tokens": size, **values})
    print(json.dumps({"machine": platform.machine(), "clock": args.clock, "rows": rows}))


if __name__ == "__main__":
    main()
