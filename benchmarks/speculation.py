# SPDX-License-Identifier: MIT
"""Tokens per second with speculative decoding beside the same engine without it, in one run.

Three parts, greedy unless said otherwise, the demo model:

- source: real Python source (this project's) as prompts, batches of 1, 4 and 16, greedy and
  sampled. No prompt comes twice, as drafters remember;
- edit: batch 1, an answer that repeats four fifths of a file in the prompt. No small model edits
  files, so the answer is dictated: every step computes the model as ever, then the sampler's choice
  is replaced by the script's. Drafts are checked against the script like against any choice;
- nothing accepted: drafters propose what never comes.

Batches stay full: who ends is followed by the next at once, and answers are of different lengths.
Prompts are in the prefix cache, as an agent's are, so that steps are almost only those of decoding.
The two engines take turns step by step, on one thread, the one that is behind in time: what else
the machine does holds up both alike. `ratio` is the median of rounds of a second each, after some
to warm up. `same` is the share of answers that are alike in both: in bfloat16 the pieces in which
prompts are read may change a last bit.

    python benchmarks/speculation.py [--rounds 8] [--tokens 160] [--parts source edit nothing]
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokenspeed import LLM, SamplingParams
from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.execution.speculation.drafter import Proposal

PROMPT_TOKENS = 257  # whole pages, and the token that is computed in any case
BATCHES = (1, 4, 16)
TEMPERATURES = (0.0, 0.7)
NUM_PAGES = 40_000
WARM_UP_S = 3.0  # in which steps are captured, and first times and rates learnt
PER_SECOND = {1: 60, 4: 100, 16: 160}  # more prompts than these engines get through
EDIT_CHARACTERS, EDIT_TOKENS, EDIT_WARM_UP = 3000, 600, 3
_UNLIKELY = 1  # a special token
METHODS = {
    "auto": '{"method": "auto"}',
    "suffix": '{"method": "suffix"}',
    "mtp": '{"method": "mtp"}',
}
Asked = tuple[list[int], SamplingParams]  # a prompt, and how its answer is sampled


def engine(config: str | None, batch: int) -> LLM:
    """The demo, with this speculative_config, for so many requests at once."""
    return LLM("demo", speculative_config=config, max_num_seqs=batch, num_pages=NUM_PAGES)


def sources() -> list[Path]:
    """This package's files, the largest first."""
    files = (Path(__file__).parents[1] / "tokenspeed").rglob("*.py")
    return sorted(files, key=lambda path: (-path.stat().st_size, path.name))


def source_prompts(llm: LLM, count: int) -> list[list[int]]:
    """Pieces of files, in tokens: the first of each, then the second, and so on."""
    encode = llm.get_tokenizer().encode
    texts = [encode(path.read_text(encoding="utf-8")) for path in sources()]
    starts = range(0, max(map(len, texts)) - PROMPT_TOKENS, PROMPT_TOKENS)
    pieces = [text[at : at + PROMPT_TOKENS] for at in starts for text in texts]
    prompts = [piece for piece in pieces if len(piece) == PROMPT_TOKENS][:count]
    if len(prompts) < count:
        raise ValueError(f"the source gives {len(prompts)} prompts: ask for fewer than {count}")
    return prompts


def params(tokens: int, temperature: float = 0.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=7, max_tokens=tokens, ignore_eos=True)


class Side:
    """An engine, the seconds that it spent in steps, and what it answered."""

    def __init__(self, llm: LLM, batch: int) -> None:
        self._engine: Any = llm._engine
        self._batch, self._ids = batch, itertools.count(1)
        self.seconds, self.num_tokens, self.num_live = 0.0, 0, 0
        self.answers: defaultdict[int, list[int]] = defaultdict(list)  # by number of the request

    def ask(self, asked: Asked) -> None:
        prompt, how = asked
        self._engine.add_request(GenerateRequest(next(self._ids), prompt, how, []))
        self.num_live += 1

    def step(self, waiting: Iterator[Asked] | None = None) -> None:
        """One step, with as many of those who wait as there is room for."""
        start = time.perf_counter()
        while waiting is not None and self.num_live < self._batch:
            asked = next(waiting, None)
            if asked is None:
                raise ValueError("prompts ran out on so fast a machine: ask for more --tokens")
            self.ask(asked)
        outputs = self._engine.step()
        self.seconds += time.perf_counter() - start
        for output in outputs:
            self.num_tokens += len(output.token_ids)
            self.answers[output.request_id] += output.token_ids
            self.num_live -= output.finish_reason is not None

    def read(self, prompts: list[list[int]]) -> None:
        """Brings prompts into the prefix cache, and forgets the time that it took."""
        for prompt in prompts:
            self.ask((prompt, params(1)))
        while self.num_live:
            self.step()
        self._ids = itertools.count(1_000_000)
        self.answers.clear()
        self.restart()

    def restart(self) -> None:
        self.seconds, self.num_tokens = 0.0, 0


def full_batches(
    off: LLM, on: LLM, prompts: list[list[int]], batch: int, args: Any, temperature: float
) -> dict[str, Any]:
    """Both engines with full batches, in turns; ratios of tokens per second."""
    sides = {"off": Side(off, batch), "on": Side(on, batch)}
    for side in sides.values():
        side.read(prompts)
    half = args.tokens // 2
    asked = [
        (prompt, params(half + at * 37 % args.tokens, temperature))
        for at, prompt in enumerate(prompts)
    ]
    waiting = {name: iter(asked) for name in sides}
    rates: list[dict[str, float]] = []
    for seconds in [WARM_UP_S, *[args.round_s] * args.rounds]:
        for side in sides.values():
            side.restart()
        while min(side.seconds for side in sides.values()) < seconds:
            name = min(sides, key=lambda name: sides[name].seconds)
            sides[name].step(waiting[name])
        rates.append({name: side.num_tokens / side.seconds for name, side in sides.items()})
    return summary(rates[1:]) | {"same": same(sides["off"], sides["on"])}


def summary(rates: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [rate["on"] / rate["off"] for rate in rates]
    return {
        "off_tokens_per_s": round(statistics.median(rate["off"] for rate in rates), 1),
        "on_tokens_per_s": round(statistics.median(rate["on"] for rate in rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "least_ratio": round(min(ratios), 3),
    }


def same(one: Side, other: Side) -> float:
    """The share of answers that begin alike, as far as both have come."""
    both = one.answers.keys() & other.answers.keys()
    alike = [
        all(a == b for a, b in zip(one.answers[i], other.answers[i], strict=False)) for i in both
    ]
    return round(sum(alike) / max(len(alike), 1), 4)


def source(args: Any) -> list[dict[str, Any]]:
    rows = []
    for method, batch, temperature in itertools.product(args.methods, args.batches, TEMPERATURES):
        case = {"part": "source", "method": method, "batch": batch, "temperature": temperature}
        rows.append(show(case | pair(args, method, batch, temperature)))
    return rows


def nothing(args: Any) -> list[dict[str, Any]]:
    rows = []
    for method, batch in itertools.product(args.methods, args.batches):
        found = pair(args, method, batch, 0.0, spoil)
        rows.append(show({"part": "nothing accepted", "method": method, "batch": batch} | found))
    return rows


def pair(
    args: Any,
    method: str,
    batch: int,
    temperature: float,
    prepare: Callable[[LLM], None] = lambda on: None,
) -> dict[str, Any]:
    with engine('{"method": "off"}', batch) as off, engine(METHODS[method], batch) as on:
        prepare(on)
        seconds = WARM_UP_S + args.rounds * args.round_s
        prompts = source_prompts(off, int(PER_SECOND[batch] * seconds * 160 / args.tokens) + batch)
        return full_batches(off, on, prompts, batch, args, temperature)


def edited(text: str) -> str:
    """The text with every fifth line changed."""
    lines = text.splitlines(keepends=True)
    changed = [f"{line.rstrip()}  # changed {at}\n" for at, line in enumerate(lines)]
    return "".join(changed[at] if at % 5 == 4 else line for at, line in enumerate(lines))


class Dictation:
    """From the place after its prompt on, whatever models say, samplers choose the script's ids."""

    def __init__(self, *llms: LLM) -> None:
        self._start, self._script = 0, torch.zeros(1, dtype=torch.int64)
        for llm in llms:
            engine: Any = llm._engine
            sampler = engine._runner._part._sampler
            sampler._kernel = self._instead_of(sampler._kernel)

    def tell(self, start: int, script: list[int]) -> None:
        self._start, self._script = start, torch.tensor(script)

    def _instead_of(self, inner: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def sample(*inputs: torch.Tensor) -> torch.Tensor:
            inner(*inputs)  # what it costs belongs to the step
            places = (inputs[-1] - self._start).clamp(0, len(self._script) - 1)
            return self._script[places]

        return sample


def edit(args: Any) -> list[dict[str, Any]]:
    rows = []
    for method in args.methods:
        if method == "mtp":
            continue  # it hears the model, which does not know what is dictated
        with engine('{"method": "off"}', 1) as off, engine(METHODS[method], 1) as on:
            encode, dictation, rates = off.get_tokenizer().encode, Dictation(off, on), []
            for file in sources()[: EDIT_WARM_UP + args.rounds]:
                text = file.read_text(encoding="utf-8")[:EDIT_CHARACTERS]
                prompt = encode(f"Add comments to this file:\n{text}\nThe file with comments:\n")
                dictation.tell(len(prompt), encode(edited(text)))
                rates.append(one_answer(off, on, prompt))
        rows.append(show({"part": "edit", "method": method} | summary(rates[EDIT_WARM_UP:])))
    return rows


def one_answer(off: LLM, on: LLM, prompt: list[int]) -> dict[str, float]:
    """Tokens per second of one answer, its prompt read before."""
    sides = {"off": Side(off, 1), "on": Side(on, 1)}
    for side in sides.values():
        side.read([prompt])
        side.ask((prompt, params(EDIT_TOKENS)))
    while live := [side for side in sides.values() if side.num_live]:
        min(live, key=lambda side: side.seconds).step()
    if same(*sides.values()) < 1:
        raise RuntimeError("speculation changed the ids")
    return {name: side.num_tokens / side.seconds for name, side in sides.items()}


def spoil(llm: LLM) -> None:
    """Every draft is of ids that neither model nor text has in mind."""
    inside: Any = llm._engine
    for drafter in inside._speculator._drafters:
        drafter.propose = _spoilt_proposal(drafter.propose)
    weighted = inside._runner._part._drafter
    if weighted is not None:
        weighted.draft = _spoilt_drafts(weighted.draft)


def _spoilt_proposal(inner: Callable[[int, int], Proposal]) -> Callable[[int, int], Proposal]:
    def propose(request_id: int, max_tokens: int) -> Proposal:
        found = inner(request_id, max_tokens)
        return Proposal([_UNLIKELY] * len(found.ids), found.match_len)

    return propose


def _spoilt_drafts(inner: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    def draft(work: Any) -> torch.Tensor:
        ids = inner(work)
        return torch.where(ids >= 0, _UNLIKELY, ids)

    return draft


def show(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--round-s", type=float, default=1.0, help="seconds of each engine")
    parser.add_argument("--tokens", type=int, default=160, help="of an answer, in the mean")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, choices=BATCHES)
    parts = {"source": source, "edit": edit, "nothing": nothing}
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    rows = [row for part in args.parts for row in parts[part](args)]
    result = {
        "benchmark": "speculation",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "rows": rows,
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
