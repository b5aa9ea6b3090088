# SPDX-License-Identifier: MIT
"""Grammars where tokens are sampled: masks against all strings of a language, and failures."""

import itertools
import random
import re
import time

import numpy as np
import pytest
import torch

from tokenspeed.execution.grammars import (
    VOCABULARY,
    GrammarRows,
    GrammarState,
    apply_bitmask,
    pack_vocabulary,
    tokenizer_info,
    unpack_vocabulary,
)
from tokenspeed.execution.sampler import Sampler, Sequence
from tokenspeed.execution.sampling_params import Grammar, SamplingParams
from tokenspeed.text.grammar_worker import compile_spec

pytest.importorskip("xgrammar")

TOKENS = [b"a", b"b", b"ab", b"ba", b"aab", b"1", b"-", b"1-", b"\xff<end>", b"", b""]
END, SIZE = 8, len(TOKENS)
PACKED = pack_vocabulary(TOKENS, [END])
INFO = tokenizer_info(PACKED)


def compiled(regex: str) -> bytes:
    return compile_spec({"format": {"type": "regex", "pattern": regex}, "tokens": {}}, INFO)


def state(regex: str, outputs: tuple[int, ...] = ()) -> GrammarState:
    import xgrammar

    grammar = xgrammar.CompiledGrammar.deserialize_json(compiled(regex).decode(), INFO)
    return GrammarState(grammar, [END], outputs)


def allowed(one: GrammarState) -> set[int]:
    mask = torch.full((1, 1), -1, dtype=torch.int32)
    one.fill(mask, 0)
    return {token for token in range(SIZE) if int(mask[0, 0]) >> token & 1}


def rows_of(*regexes: str) -> GrammarRows:
    """A store with a grammar for each, called by its regex."""
    rows = GrammarRows(SIZE)
    rows.store.take([(VOCABULARY, PACKED), *((regex, compiled(regex)) for regex in regexes)])
    return rows


@pytest.mark.parametrize("regex", ["a{2,4}b?", "(ab|ba){1,2}1?", "[ab]{0,3}-", "(a|aab)(1-)*1"])
def test_masks_are_those_of_all_strings(regex: str) -> None:
    alphabet, longest = "ab1-", 7
    words = ("".join(w) for n in range(longest + 1) for w in itertools.product(alphabet, repeat=n))
    language = {word for word in words if re.fullmatch(regex, word)}
    prefixes = {word[:n] for word in language for n in range(len(word) + 1)}
    rng = random.Random(regex)
    for _ in range(20):
        one, text = state(regex), ""
        while len(text) <= longest - 3:  # beyond, the words above are not all
            fits = {i for i, t in enumerate(TOKENS[:END]) if text + t.decode() in prefixes}
            assert allowed(one) == fits | ({END} if text in language else set())
            assert one.complete == (text in language)
            if not fits:
                break
            token = rng.choice(sorted(fits))
            one.record(token)
            text += TOKENS[token].decode()


def test_a_state_is_rebuilt_from_its_outputs() -> None:
    one = state("(ab|ba){3}1")
    for token in (2, 0, 1):
        one.record(token)
    assert allowed(state("(ab|ba){3}1", (2, 0, 1))) == allowed(one) == {0, 1, 2, 3}


def test_what_comes_after_the_end_is_of_no_interest() -> None:
    one = state("a")
    one.record(0)
    one.record(END)
    one.record(3)
    mask = torch.full((1, 1), -1, dtype=torch.int32)
    assert not one.failed
    assert not one.fill(mask, 0)


def test_a_grammar_that_takes_too_long_fails_alone() -> None:
    import xgrammar

    form = {"type": "grammar", "grammar": 'root ::= root root | "a"'}  # slower with every token
    data = compile_spec({"format": form, "tokens": {}}, INFO)
    slow = GrammarState(xgrammar.CompiledGrammar.deserialize_json(data.decode(), INFO), [END], ())
    quick = state("a*")
    begin = time.thread_time()
    for _ in range(2000):
        slow.record(0)
    assert slow.failed
    assert not allowed(slow)
    assert time.thread_time() - begin < 30.0
    for _ in range(2000):
        quick.record(0)
    assert allowed(quick) == {0, END}


def test_only_rows_with_a_grammar_are_masked() -> None:
    rows = rows_of("a+", "b")
    assert not rows
    rows.bind(0, "a+", [END], [])
    rows.bind(2, "b", [END], [])
    logits = torch.zeros(3, SIZE)
    rows.mask(logits, [2, 1, 0])
    finite = [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in logits]
    assert finite == [{1}, set(range(SIZE)), {0}]
    rows.record([2, 1, 0], torch.tensor([1, 0, 0]), [])
    logits = torch.zeros(2, SIZE)
    rows.mask(logits, [0, 2])
    finite = [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in logits]
    assert finite == [{0, END}, {END}]
    rows.bind(0, None, [END], [])
    rows.bind(2, None, [END], [])
    assert not rows


def test_what_is_wrong_costs_its_own_row() -> None:
    rows = rows_of("a+")
    rows.store.take([("junk", b"{"), ("gone", compiled("b")), ("gone", None)])
    for slot, key in enumerate(("junk", "gone", "never", "a+", "a+")):
        rows.bind(slot, key, [END], [1] if slot == 4 else [])  # slot 4: what its grammar forbids
    logits = torch.zeros(5, SIZE)
    rows.mask(logits, [0, 1, 2, 3, 4])
    assert torch.isneginf(logits[[0, 1, 2, 4]]).all()
    assert torch.isfinite(logits[3]).sum() == 1


def sampler_of(regex: str, **params: object) -> Sampler:
    sampler = Sampler(max_num_seqs=2, vocab_size=SIZE, device=torch.device("cpu"))
    sampler.grammars = rows_of(regex)
    made = SamplingParams(grammar=Grammar(regex), **params)  # type: ignore[arg-type]
    sequence = Sequence(np.array([1], np.int32), made, [END], 7)
    sampler.bind(0, sequence, [])
    return sampler


def run(sampler: Sampler, max_tokens: int = 20, first: int = 1) -> list[int]:
    """Samples until the end of the sequence, or until no token is left."""
    out: list[int] = []
    for place in range(first, first + max_tokens):
        logits = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(place))
        ids, _ = sampler.sample(logits, np.array([0], np.int32), torch.tensor([place]))
        out.append(int(ids[0]))
        if out[-1] in (END, -1):
            break
    return out


@pytest.mark.parametrize("seed", range(8))
def test_samples_follow_the_grammar(seed: int) -> None:
    out = run(sampler_of("(ab|ba){2}1", seed=seed))
    assert out[-1] == END
    assert re.fullmatch("(ab|ba){2}1", b"".join(TOKENS[token] for token in out[:-1]).decode())


def test_min_tokens_ends_where_the_grammar_does() -> None:
    assert run(sampler_of("ab?", min_tokens=9, temperature=0.0))[-1] == END
    out = run(sampler_of("a{1,9}", min_tokens=4, temperature=0.0))
    assert len(out) >= 5
    assert out[-1] == END


def test_what_leaves_no_token_fails() -> None:
    assert run(sampler_of("ab", allowed_token_ids=[5])) == [-1]


def test_a_retracted_request_goes_on_where_it_was() -> None:
    sampler = sampler_of("(ab|ba){4}", seed=3)
    whole = run(sampler_of("(ab|ba){4}", seed=3))
    params = SamplingParams(grammar=Grammar("(ab|ba){4}"), seed=3)
    for cut in range(len(whole)):
        sampler.bind(0, Sequence(np.array([1], np.int32), params, [END], 7), whole[:cut])
        generator = torch.Generator().manual_seed(cut + 1)
        logits = torch.randn(1, SIZE, generator=generator)
        ids, _ = sampler.sample(logits, np.array([0], np.int32), torch.tensor([cut + 1]))
        assert int(ids[0]) == whole[cut]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_both_ways_to_apply_a_mask(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(4, vocab_size, generator=generator)
    words = -(-vocab_size // 32)
    mask = torch.randint(-(2**31), 2**31, (4, words), generator=generator, dtype=torch.int64)
    mask = mask.to(torch.int32)
    ours, theirs = logits.clone(), logits.clone()
    apply_bitmask(theirs, mask, [0, 2])
    monkeypatch.setattr("tokenspeed.execution.grammars.CPU", "none")
    apply_bitmask(ours, mask, [0, 2])
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[[1, 3]], logits[[1, 3]])


def test_a_vocabulary_travels() -> None:
    assert unpack_vocabulary(PACKED) == (TOKENS, [END])
    for junk in (b"", b"\x01", PACKED[:-1], PACKED + b"x", b"\xff" * 12):
        with pytest.raises(ValueError, match="vocabulary"):
            unpack_vocabulary(junk)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0])
def test_late_and_early_masks_choose_the_same_tokens(seed: int, temperature: float) -> None:
    late, early = (sampler_of("(a|bc)+(d|e*)", temperature=temperature) for _ in range(2))
    assert late.grammars._late == {0}
    early.grammars._late.clear()
    assert run(late, first=1 + 50 * seed) == run(early, first=1 + 50 * seed)


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_where_the_mask_changes_what_there_is_to_choose_from_it_comes_first(truncation) -> None:
    assert not sampler_of("a+", **truncation).grammars._late
