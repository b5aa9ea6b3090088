# SPDX-License-Identifier: MIT
"""Tokens per second with speculative decoding beside the same engine without it, in one run.

Three parts, greedy unless said otherwise, the demo model:

- source: real Python source (this project's) as prompts, batches of 1, 4 and 16, greedy and
  sampled. No prompt comes twice, as drafters remember;
- edit: batch 1, an answer that repeats four fifths of a file in the prompt. No small model edits
  files, so the answer is dictated: every step computes the model as ever, then the sampler's choice
  is replaced by the script's. Drafts are checked against the script like against any choice;
- nothing accepted: drafters propose what never comes.

Time is that of decoding: of all tokens less that of the first. Rounds alternate; ratios are taken
within a round; the first ones warm up. Prefix caching is off. A step has room for all prompts at
once, so that each is read in one piece: ids must be the same with and without, and in bfloat16 they
may depend on the pieces.

    python benchmarks/speculation.py [--rounds 5] [--tokens 192] [--parts source edit nothing]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenspeed import LLM, SamplingParams
from tokenspeed.execution.speculation.drafter import Proposal

PROMPT_TOKENS = 256
BATCHES = (1, 4, 16)
SINGLES = 8  # prompts that the batch of one goes through, one after the other
TEMPERATURES = (0.0, 0.7)
WARM_UP = 2  # rounds in which steps are captured, and first times and rates learnt
EDIT_CHARACTERS, EDIT_TOKENS = 3000, 600
_UNLIKELY = 1  # a special token
METHODS = {
    "auto": '{"method": "auto"}',
    "suffix": '{"method": "suffix"}',
    "mtp": '{"method": "mtp"}',
}


def engine(config: str | None) -> LLM:
    """The demo, with this speculative_config."""
    return LLM(
        "demo",
        speculative_config=config,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=max(BATCHES) * PROMPT_TOKENS * 2,
        enable_prefix_caching=False,
    )


def source_prompts(llm: LLM, count: int, part: int) -> list[list[int]]:
    """The `part`-th piece of each of this package's largest files, in tokens."""
    folder = Path(__file__).parents[1] / "tokenspeed"
    files = sorted(folder.rglob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    texts = [path.read_text(encoding="utf-8") for path in files[:count]]
    start = part * PROMPT_TOKENS
    prompts = [llm.get_tokenizer().encode(text)[start : start + PROMPT_TOKENS] for text in texts]
    if any(len(prompt) < PROMPT_TOKENS for prompt in prompts):
        raise ValueError("there is not enough source for so many rounds")
    return prompts


def source_groups(llm: LLM, batch: int, part: int) -> list[list[list[int]]]:
    """What one round runs: a batch, or for a batch of one some prompts one after the other."""
    if batch == 1:
        return [[one] for one in source_prompts(llm, SINGLES, part)]
    return [source_prompts(llm, batch, part)]


def decode_seconds(
    llm: LLM, prompts: Sequence[list[int]], tokens: int, temperature: float
) -> tuple[float, list[list[int]]]:
    """Seconds from everybody's first token to everybody's last, and the ids."""
    asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]

    def run(count: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(
            temperature=temperature, seed=7, max_tokens=count, ignore_eos=True, min_tokens=0
        )
        start = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - start, [output.outputs[0].token_ids for output in outputs]

    first, _ = run(1)
    whole, ids = run(tokens + 1)
    return whole - first, ids


def compare(
    off: LLM,
    on: LLM,
    groups_of: Callable[[int], Sequence[Sequence[list[int]]]],
    args: Any,
    temperature: float,
) -> dict[str, Any]:
    """Both engines through the groups of each round, in turns; ratios of tokens per second."""
    ratios, rates = [], []
    for number in range(WARM_UP + args.rounds):
        groups = groups_of(number)
        seconds = {"off": 0.0, "on": 0.0}
        answers: dict[str, list[list[list[int]]]] = {"off": [], "on": []}
        order: list[tuple[str, LLM]] = [("off", off), ("on", on)]
        for group in groups:
            for name, llm in order if number % 2 else order[::-1]:
                spent, ids = decode_seconds(llm, group, args.tokens, temperature)
                seconds[name] += spent
                answers[name].append(ids)
        if answers["off"] != answers["on"]:
            raise RuntimeError("speculation changed the ids")
        if number >= WARM_UP:
            ratios.append(seconds["off"] / seconds["on"])
            rates.append(
                {name: tokens_per_s(groups, args.tokens, s) for name, s in seconds.items()}
            )
    return {
        "off_tokens_per_s": round(statistics.median(rate["off"] for rate in rates), 1),
        "on_tokens_per_s": round(statistics.median(rate["on"] for rate in rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "least_ratio": round(min(ratios), 3),
    }


def tokens_per_s(groups: Sequence[Sequence[list[int]]], tokens: int, seconds: float) -> float:
    return sum(len(group) for group in groups) * tokens / seconds


def source(off: LLM, args: Any) -> list[dict[str, Any]]:
    rows = []
    for method in args.methods:
        for batch in BATCHES:
            for temperature in TEMPERATURES:
                with engine(METHODS[method]) as on:

                    def groups(number: int, batch: int = batch) -> list[list[list[int]]]:
                        return source_groups(off, batch, number)

                    found = compare(off, on, groups, args, temperature)
                case = {"part": "source", "method": method, "batch": batch}
                rows.append(show(case | {"temperature": temperature} | found))
    return rows


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
            sampler = sampler_of(llm)
            sampler._kernel = self._instead_of(sampler._kernel)

    def tell(self, start: int, script: list[int]) -> None:
        self._start, self._script = start, torch.tensor(script)

    def _instead_of(self, inner: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def sample(*inputs: torch.Tensor) -> torch.Tensor:
            inner(*inputs)  # what it costs belongs to the step
            places = (inputs[-1] - self._start).clamp(0, len(self._script) - 1)
            return self._script[places]

        return sample


def sampler_of(llm: LLM) -> Any:
    engine: Any = llm._engine
    return engine._runner._part._sampler


def edit(args: Any) -> list[dict[str, Any]]:
    rows = []
    folder = Path(__file__).parents[1] / "tokenspeed"
    files = sorted(folder.rglob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    for method in args.methods:
        if method == "mtp":
            continue  # it hears the model, which does not know what is dictated
        with engine('{"method": "off"}') as off, engine(METHODS[method]) as on:
            encode, dictation = off.get_tokenizer().encode, Dictation(off, on)

            def groups(
                number: int, encode: Any = encode, dictation: Dictation = dictation
            ) -> list[list[list[int]]]:
                file = files[number].read_text(encoding="utf-8")[:EDIT_CHARACTERS]
                prompt = encode(f"Add comments to this file:\n{file}\nThe file with comments:\n")
                dictation.tell(len(prompt), encode(edited(file)))
                return [[prompt]]

            asked = argparse.Namespace(rounds=args.rounds, tokens=EDIT_TOKENS)
            found = compare(off, on, groups, asked, 0.0)
        rows.append(show({"part": "edit", "method": method, "batch": 1} | found))
    return rows


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


def nothing(off: LLM, args: Any) -> list[dict[str, Any]]:
    rows = []
    for method in args.methods:
        for batch in BATCHES:
            with engine(METHODS[method]) as on:
                spoil(on)

                def groups(number: int, batch: int = batch) -> list[list[list[int]]]:
                    return source_groups(off, batch, number)

                found = compare(off, on, groups, args, 0.0)
            rows.append(
                show({"part": "nothing accepted", "method": method, "batch": batch} | found)
            )
    return rows


def show(row: dict[str, Any]) -> dict[str, Any]:
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parts = ("source", "edit", "nothing")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    off, rows = engine('{"method": "off"}'), []
    if "source" in args.parts:
        rows += source(off, args)
    if "edit" in args.parts:
        rows += edit(args)
    if "nothing" in args.parts:
        rows += nothing(off, args)
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
