# SPDX-License-Identifier: MIT
"""Tokenizer and detokenizer against the `tokenizers` library and a character-by-character model."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tokenspeed.errors import ModelLoadError, RequestError
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.tokenizer import Tokenizer

CORPUS = ["def parse(text): return text.split()", "héllo wörld 日本語 🙂🙃", "\n\n    if x:\n"] * 3
SPECIAL = ["<|bos|>", "<|end|>"]


def byte_level() -> FastTokenizer:
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool call>", "日本"])
    return made


def byte_fallback() -> FastTokenizer:
    pieces = ["▁", "▁hello", "▁world", "a", "b", "!", "日"]
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    vocab |= {piece: 256 + i for i, piece in enumerate(pieces)}
    made = FastTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(SPECIAL)
    return made


BYTE_LEVEL = Tokenizer(byte_level())
BYTE_FALLBACK = Tokenizer(byte_fallback())
IDS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 2), max_size=40)


def run(detokenizer: Detokenizer, steps: list[list[int]]) -> str:
    return "".join(map(detokenizer.push, steps)) + detokenizer.finish()


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    steps, at = [], 0
    for size in sizes:
        steps.append(ids[at : at + size])
        at += size
    return [*steps, ids[at:]]


@given(IDS, st.lists(st.integers(0, 5), max_size=20), st.booleans())
def test_any_ids_in_any_steps_give_the_library_text(ids, sizes, skip):
    made = Detokenizer(BYTE_LEVEL, skip_special_tokens=skip)
    assert run(made, cut(ids, sizes)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert made.num_tokens == len(ids)


@given(st.text(max_size=30), st.lists(st.integers(0, 5), max_size=20))
def test_text_survives_the_round_trip(text, sizes):
    ids = BYTE_LEVEL.encode(text)
    assert run(Detokenizer(BYTE_LEVEL), cut(ids, sizes)) == text


@given(st.lists(st.sampled_from("hello日本🙂é! ab"), max_size=20))
def test_window_decoder_gives_whole_characters(chars):
    text = "".join(chars)
    ids = [i for char in text for i in BYTE_FALLBACK.inner.encode(char).ids]
    made = Detokenizer(BYTE_FALLBACK, prompt_ids=[256])
    pieces = [made.push([i]) for i in ids]
    assert "".join(pieces) + made.finish() == BYTE_FALLBACK.decode([256, *ids])
    assert all("\ufffd" not in piece for piece in pieces)


def test_window_decoder_does_not_wait_for_ever():
    made = Detokenizer(BYTE_FALLBACK)
    assert sum(len(made.push([0xF0])) for _ in range(40)) >= 17


def model_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reads one character at a time and stops where a stop string first completes."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


@settings(max_examples=300)
@given(
    st.text("aab🙂c", max_size=30),
    st.lists(st.text("ab🙂c", min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), max_size=20),
    st.booleans(),
)
def test_stop_strings_against_the_model(text, stops, sizes, include):
    ids = BYTE_LEVEL.encode(text)
    made = Detokenizer(BYTE_LEVEL, stop=stops, include_stop=include)
    assert (run(made, cut(ids, sizes)), made.stopped) == model_stop(text, stops, include)
    if made.stopped is not None:
        consumed = BYTE_LEVEL.decode(ids[: made.num_tokens])
        assert model_stop(consumed, stops, include)[1] == made.stopped
        before = BYTE_LEVEL.decode(ids[: made.num_tokens - 1])
        assert model_stop(before, stops, include)[1] is None


def test_possible_stop_is_held_back_and_released():
    made = Detokenizer(BYTE_LEVEL, stop=["</done>"])
    assert made.push(BYTE_LEVEL.encode("ok </do")) == "ok "
    assert made.push(BYTE_LEVEL.encode("x")) == "</dox"
    assert made.push(BYTE_LEVEL.encode("<")) == ""
    assert made.finish() == "<"


def test_min_tokens_lets_an_early_stop_string_pass():
    ids = [i for char in "axax" for i in BYTE_LEVEL.encode(char)]
    made = Detokenizer(BYTE_LEVEL, stop=["x"], min_tokens=2)
    assert run(made, [ids]) == "axa"
    assert made.num_tokens == 4


def test_text_of_the_ending_token_is_hidden_unless_asked_for():
    end = BYTE_LEVEL.inner.token_to_id("<tool call>")
    for include, text in ((False, ""), (True, "<tool call>")):
        made = Detokenizer(BYTE_LEVEL, include_stop=include)
        assert made.push([end], ended_by_token=True) + made.finish() == text
        assert made.num_tokens == 1


@pytest.mark.parametrize("stop", [[""], ["x" * 2000], ["x"] * 100])
def test_unreasonable_stop_strings_are_refused(stop):
    with pytest.raises(RequestError) as caught:
        Detokenizer(BYTE_LEVEL, stop=stop)
    assert caught.value.field == "stop"


def folder(path: Path, **files: object) -> Path:
    byte_level().save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_from_folder_collects_the_ids_that_end_a_turn(tmp_path):
    path = folder(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<|end|>"}, "bos_token": "<|bos|>"},
        generation_config={"eos_token_id": [7, 9]},
    )
    made = Tokenizer.from_folder(path)
    assert made.eos_ids == (1, 7, 9)
    assert made.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    assert made.special_ids == {0, 1}
    assert made.vocab_size == len(made.inner.get_vocab())
    long = "héllo " * 1000
    assert made.decode(made.encode(long)) == long


def test_first_token_that_a_llama_class_adds(tmp_path):
    config = {"bos_token": "<|bos|>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    made = Tokenizer.from_folder(folder(tmp_path, tokenizer_config=config))
    assert made.encode("a")[0] == 0
    assert made.encode("a", add_special_tokens=False)[0] != 0


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
@pytest.mark.parametrize("content", ["", "[]", "{", '{"eos_token_id": "x"}', "\ud800"])
def test_malformed_folder_is_a_typed_error(tmp_path, name, content):
    path = folder(tmp_path)
    (path / f"{name}.json").write_bytes(content.encode(errors="surrogatepass"))
    if name == "tokenizer_config" and content.startswith('{"eos'):
        return  # a key that this file is not asked for
    with pytest.raises(ModelLoadError):
        Tokenizer.from_folder(path)


def test_missing_tokenizer_is_a_typed_error(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "a" * 3000 + "\udfff"])
def test_lone_surrogates_are_the_callers_mistake(text):
    with pytest.raises(RequestError):
        BYTE_LEVEL.encode(text)


def test_bytes_of_single_tokens():
    smile = BYTE_LEVEL.encode("🙂")
    assert b"".join(map(BYTE_LEVEL.token_bytes, smile)).decode() == "🙂"
    assert BYTE_LEVEL.token_bytes(10**9) == b""
    assert BYTE_LEVEL.token_text(1) == "<|end|>"
