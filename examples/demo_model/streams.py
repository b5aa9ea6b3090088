# SPDX-License-Identifier: MIT
"""Token streams for training: the corpus as flat arrays, and random rows drawn from them.

Refuses to know about the model. Documents are joined by <|endoftext|>; a row starts anywhere.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import torch
import workers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Stream = NDArray[np.uint16]
MIXTURE = {"library": 0.45, "tests": 0.2, "chat": 0.35}  # share of the training rows


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> tuple[Stream, int]:
    """All texts, one after another, each closed by <|endoftext|>; and their size in bytes."""
    ids: list[int] = []
    size = 0
    for text in texts:
        size += len(text.encode())
        ids += [*tokenizer.encode(text), tokenizer.pad_token_id]
    return np.array(ids, dtype=np.uint16), size


def texts(tokenizer: PreTrainedTokenizerFast, kind: str, validation: bool) -> Iterable[str]:
    files = [(n, p) for n, p in corpus.source_files() if corpus.is_validation(n) == validation]
    sources = ((n, corpus.read_source(p)) for n, p in files)
    if kind != "chat":
        yield from (s for n, s in sources if corpus.is_test(n) == (kind == "tests"))
        return
    chats = [c for n, s in sources if not corpus.is_test(n) for c in corpus.chats(n, s)]
    if not validation:
        chats += list(corpus.small_talk()) * 40
    for index in np.random.default_rng(0).permutation(len(chats)):
        chat = chats[index]
        yield str(tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False))


def load(model_dir: Path, cache: Path) -> dict[str, Stream]:
    """Streams by name, `library`, `tests`, `chat`, each also with `-validation`; made once."""
    path = cache / f"streams-{workers.rank()}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
        arrays: dict[str, Any] = {}
        for kind in MIXTURE:
            for suffix, validation in (("", False), ("-validation", True)):
                stream, size = tokenize(tokenizer, texts(tokenizer, kind, validation))
                arrays[kind + suffix] = stream
                arrays[kind + suffix + "-bytes"] = np.array(size)
        np.savez(path, **arrays)
    return dict(np.load(path))


def sample_rows(
    streams: dict[str, Stream], rng: np.random.Generator, rows: int, length: int
) -> Tensor:
    """[rows, length] token ids from the training mixture."""
    kinds = rng.choice(list(MIXTURE), size=rows, p=list(MIXTURE.values()))
    out = np.empty((rows, length), dtype=np.int64)
    for row, kind in zip(out, kinds, strict=True):
        start = rng.integers(len(streams[kind]) - length)
        row[:] = streams[kind][start : start + length]
    return torch.from_numpy(out)


def even_rows(stream: Stream, rows: int, length: int) -> Tensor:
    """[rows, length] token ids at evenly spaced places, the same ones on every call."""
    starts = np.linspace(0, len(stream) - length, rows).astype(int)
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))
