# SPDX-License-Identifier: MIT
"""`Tokenizer`: text to ids and back, from a model folder. Knows no requests and no streams.

Reads `tokenizer.json` (the `tokenizers` library does the work), `tokenizer_config.json` for the
names of special tokens, and `generation_config.json` for the ids that end a turn. Runs no code
from the folder. Spaces are never "cleaned up" after decoding: a token's text is what it is.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from tokenspeed.errors import ModelLoadError, RequestError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_LONG_TEXT = 2048  # characters from which encoding releases the interpreter lock


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as used by byte-level BPE."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_of_char()


class Tokenizer:
    """Thread-safe. `eos_ids` end a turn; `special_tokens` maps names like `bos_token` to text."""

    def __init__(
        self,
        inner: FastTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        eos_ids: tuple[int, ...] = (),
        add_bos: bool = False,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.special_tokens = special_tokens or {}
        self.eos_ids = eos_ids
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids are below this
        self.max_chars_per_token = max(map(len, vocab), default=1)
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_tokens = {i: token.content for i, token in added.items()}
        self.is_byte_level = isinstance(inner.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        self.whole_texts = _WholeTexts(self.token_bytes)
        self._bos: list[int] = []
        bos = inner.token_to_id(self.special_tokens.get("bos_token", "")) if add_bos else None
        if bos is not None and inner.encode("").ids[:1] != [bos]:
            self._bos = [bos]

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Loads a folder in Hugging Face layout. Raises `ModelLoadError` saying what is wrong."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelLoadError(f"no tokenizer.json in {folder} (other formats are not supported)")
        try:
            inner = FastTokenizer.from_file(str(file))
        except Exception as error:
            raise ModelLoadError(f"{file} is not a tokenizer: {error}") from None
        config = read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config)
        eos = _eos_ids(folder, inner, special.get("eos_token"))
        return cls(inner, special_tokens=special, eos_ids=eos, add_bos=_adds_bos(config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Raises `RequestError` for text that is not valid Unicode."""
        try:
            if len(text) < _LONG_TEXT:
                ids = self.inner.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                batch = self.inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                ids = batch[0].ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError("the text is not valid Unicode", code="invalid_unicode") from None
        return self._bos + ids if add_special_tokens else ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD. Unknown ids are empty."""
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token alone, special or not; may be part of a character."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._token_bytes(token_id)
        return found

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.inner.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if not self.is_byte_level:
            return self.inner.decode([token_id], skip_special_tokens=False).encode()
        if all(char in _BYTES for char in token):
            return bytes(_BYTES[char] for char in token)
        return token.encode()

    def token_text(self, token_id: int) -> str:
        """One token's text alone, for logprobs; bytes that form no character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")


class _WholeTexts(dict[int, str | None]):
    """Text of each token whose bytes are whole characters; None of any other."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        made: str | None = None
        with contextlib.suppress(UnicodeDecodeError):
            made = self._token_bytes(token_id).decode()
        self[token_id] = made
        return made


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder, empty if the file is missing. Raises `ModelLoadError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    special = {}
    for name in _NAMED:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return special


def _adds_bos(config: dict[str, Any]) -> bool:
    """Llama-like classes add the first token by option, not in the file's post-processor."""
    return config.get("add_bos_token") is True and "Llama" in str(config.get("tokenizer_class"))


def _eos_ids(folder: Path, inner: FastTokenizer, eos_token: str | None) -> tuple[int, ...]:
    """Ids that end a turn: the tokenizer's own and those of the generation config, ascending."""
    ids = {inner.token_to_id(eos_token)} if eos_token is not None else set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if value is not None:
            listed = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed):
                raise ModelLoadError(f"eos_token_id in {folder / name} must be ids, not {value!r}")
            ids.update(listed)
            break
    return tuple(sorted(i for i in ids if i is not None))
