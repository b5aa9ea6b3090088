# SPDX-License-Identifier: MIT
"""Compiled grammars where tokens are sampled: which may come next, by slot.

`GrammarStore` holds what the front end compiled, `GrammarState` is one request's place in one,
`GrammarRows` are those of a batch. Knows ids; refuses to know schemas, text and HTTP. The library
`xgrammar` is imported with the first vocabulary, in a thread, so that no step waits for it.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

if TYPE_CHECKING:
    import xgrammar

VOCABULARY: Final = ""  # the key under which the tokens' texts travel
CPU = "cpu"  # where the library applies masks itself
NEVER: Final = float("-inf")
ALLOWANCE_S: Final = 0.25  # of CPU that a request's grammar may take,
PER_TOKEN_S: Final = 0.005  # and for each of its tokens: everybody waits meanwhile
_BITS: Final = 32

News = tuple[str, bytes | None]  # a key with its compiled grammar; None: forget it


def pack_vocabulary(tokens: Sequence[bytes], stop_ids: Sequence[int]) -> bytes:
    """Tokens' texts by id, one for each logit, and the ids that end a turn, as bytes."""
    head = np.array([len(stop_ids), len(tokens), *stop_ids, *map(len, tokens)], np.int32)
    return head.tobytes() + b"".join(tokens)


def unpack_vocabulary(data: bytes) -> tuple[list[bytes], list[int]]:
    """The inverse of `pack_vocabulary`. `ValueError` for anything else."""
    words = np.frombuffer(data, np.int32, count=len(data) // 4)
    if len(words) < 2 or words[:2].min() < 0 or len(words) < 2 + int(words[:2].sum()):
        raise ValueError("not a vocabulary")
    num_stops, num_tokens = words[:2].tolist()
    lengths = words[2 + num_stops : 2 + num_stops + num_tokens]
    at = 4 * (2 + num_stops + num_tokens)
    ends = at + np.cumsum(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 0 or ends[-1] != len(data)):
        raise ValueError("a vocabulary of other lengths than it says")
    starts = (ends - lengths).tolist()
    tokens = [data[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]
    return tokens, words[2 : 2 + num_stops].tolist()


def tokenizer_info(data: bytes) -> "xgrammar.TokenizerInfo":
    """A packed vocabulary as xgrammar wants it. `ImportError` where that is not installed."""
    import xgrammar

    tokens, stop_ids = unpack_vocabulary(data)
    return xgrammar.TokenizerInfo(
        tokens,
        xgrammar.VocabType.RAW,
        vocab_size=len(tokens),
        stop_token_ids=stop_ids or [len(tokens) - 1],
    )


class GrammarStore:
    """What the front end sent. Grammars are decoded in a thread of their own."""

    def __init__(self) -> None:
        self._grammars: dict[str, Future[xgrammar.CompiledGrammar]] = {}
        self._info: Future[xgrammar.TokenizerInfo] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def take(self, news: Iterable[News]) -> None:
        """Adds, or drops, in order. Bad bytes show when a request needs them."""
        for key, data in news:
            if data is None:
                self._grammars.pop(key, None)
                continue
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "grammars")
            if key == VOCABULARY:
                self._info = self._thread.submit(tokenizer_info, data)
            elif self._info is not None:
                self._grammars[key] = self._thread.submit(_decode, data, self._info)

    def get(self, key: str) -> "xgrammar.CompiledGrammar":
        """Waits for it to be decoded. `LookupError` if it is not here, or what decoding raised."""
        return self._grammars[key].result()


def _decode(data: bytes, info: "Future[xgrammar.TokenizerInfo]") -> "xgrammar.CompiledGrammar":
    import xgrammar

    return xgrammar.CompiledGrammar.deserialize_json(data.decode(), info.result())


class GrammarState:
    """One request's place in its grammar. A token that does not fit makes it `failed` for ever.

    So does a grammar that takes too long: what is ambiguous can take longer with every token.
    """

    def __init__(
        self, grammar: "xgrammar.CompiledGrammar", stop_ids: list[int], output_ids: Iterable[int]
    ) -> None:
        """`stop_ids` (at least one) come when the grammar is complete and never before."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(grammar, override_stop_tokens=stop_ids)
        self.stop_ids = stop_ids
        self.failed = False
        self.over = False  # a stop token has come; what follows is of no interest
        self._left_s = ALLOWANCE_S
        for token in output_ids:
            self.record(token)

    @property
    def complete(self) -> bool:
        """Whether the output so far may end here."""
        return not self.failed and bool(self._matcher.is_completed())

    def record(self, token: int) -> None:
        """Takes note of a token that was sampled; after a stop token of none."""
        self.failed = not self.offer(token)

    def offer(self, token: int) -> bool:
        """Takes note of a token if it fits; whether it does. After a stop token any does."""
        if self.failed or self.over:
            return not self.failed
        begin = time.thread_time()
        fits = bool(self._matcher.accept_token(token))
        self.over = fits and token in self.stop_ids
        self._left_s += PER_TOKEN_S
        self._pay(begin)
        return fits and not self.failed

    def _pay(self, begin: float) -> None:
        """For the CPU time since `begin`, by this thread's clock."""
        self._left_s -= time.thread_time() - begin
        self.failed = self.failed or self._left_s < 0

    def fill(self, bitmask: torch.Tensor, row: int) -> bool:
        """Sets a row's bits of the tokens that may come next; whether any is missing."""
        if self.failed:
            bitmask[row] = 0
            return True
        begin = time.thread_time()
        missing = not self.over and bool(self._matcher.fill_next_token_bitmask(bitmask, row))
        self._pay(begin)
        return missing


class GrammarRows:
    """The states of the slots, and the masks of a step. False while no slot has a grammar.

    Where a token is chosen from all of them, by noise that is a function of the token, one that
    fits is the one that a mask would have left: such slots are `late`, and need a mask only for
    what did not fit. Most does.
    """

    def __init__(self, vocab_size: int) -> None:
        self.store = GrammarStore()
        self._states: dict[int, GrammarState | None] = {}  # None: it could not be made
        self._late: set[int] = set()
        self._sampled: tuple[list[GrammarState], list[int], torch.Tensor] | None = None
        self._bitmask = torch.zeros((0, -(-vocab_size // _BITS)), dtype=torch.int32)

    def __bool__(self) -> bool:
        return bool(self._states)

    def __contains__(self, slot: int) -> bool:
        return slot in self._states

    def bind(
        self,
        slot: int,
        key: str | None,
        stop_ids: list[int],
        output_ids: list[int],
        *,
        late: bool = False,
    ) -> None:
        """Gives the slot to a request that has produced `output_ids`; `key` None: no grammar."""
        self._settle()
        self._states.pop(slot, None)
        self._late.discard(slot)
        if key is not None:
            self._states[slot] = self._make(key, stop_ids, output_ids)
            if late:
                self._late.add(slot)

    def _make(self, key: str, stop_ids: list[int], output_ids: list[int]) -> GrammarState | None:
        try:
            return GrammarState(self.store.get(key), stop_ids, output_ids)
        except Exception:  # bytes of another version, a key dropped: this request ends alone
            return None

    def mask(self, logits: torch.Tensor, slots: list[int]) -> None:
        """logits [B, vocab_size], in place: -inf where a row's grammar does not allow the token.

        A row that failed loses them all. A row that other parameters left without a token may
        still end, if its grammar is complete.
        """
        self._settle()
        early = self._states.keys() - self._late
        rows = [row for row, slot in enumerate(slots) if slot in early]
        if rows:
            self._mask(logits, slots, rows)

    def again(self, logits: torch.Tensor, slots: list[int], ids: torch.Tensor) -> list[int]:
        """Looks at the ids [B] of late rows. Those that do not fit are masked: sample them again,
        and `record` what comes."""
        if self._late.isdisjoint(slots):
            return []
        listed = ids.tolist()
        rows = [row for row, slot in enumerate(slots) if slot in self._late]
        rows = [row for row in rows if not self._offer(slots[row], listed[row])]
        if rows:
            self._mask(logits, slots, rows)
        return rows

    def _offer(self, slot: int, token: int) -> bool:
        state = self._states[slot]
        try:
            return token < 0 or (state is not None and state.offer(token))
        except RuntimeError:
            self._states[slot] = None
            return False

    def _mask(self, logits: torch.Tensor, slots: list[int], rows: list[int]) -> None:
        bitmask = self._bitmask
        if len(bitmask) < len(slots):
            self._bitmask = bitmask = bitmask.new_zeros((len(slots), bitmask.shape[1]))
        rows = [row for row in rows if self._fill(slots[row], bitmask, row)]
        if rows:
            apply_bitmask(logits, bitmask, rows)

    def _fill(self, slot: int, bitmask: torch.Tensor, row: int) -> bool:
        state = self._states[slot]
        try:
            if state is not None:
                return state.fill(bitmask, row)
        except RuntimeError:  # the library found itself wrong: this request ends alone
            self._states[slot] = None
        bitmask[row] = 0
        return True

    def may_end(self, logits: torch.Tensor, slots: list[int], rows: Iterable[int]) -> None:
        """Of these rows, lets those end that have no token left and a complete grammar."""
        for row in rows:
            state = self._states.get(slots[row])
            if state is not None and state.complete and bool(torch.isneginf(logits[row]).all()):
                logits[row, torch.tensor(state.stop_ids, device=logits.device)] = 0.0

    def record(self, slots: list[int], ids: torch.Tensor, again: list[int]) -> None:
        """Takes note of a step's ids [B], once they are needed: nothing waits for them here.

        `again`: the late rows that were sampled twice; of the others it is known.
        """
        states = [
            (row, self._states.get(slot))
            for row, slot in enumerate(slots)
            if slot not in self._late or row in again
        ]
        found = [(row, state) for row, state in states if state is not None]
        if found:
            self._sampled = [state for _, state in found], [row for row, _ in found], ids

    def _settle(self) -> None:
        if self._sampled is None:
            return
        (states, rows, ids), self._sampled = self._sampled, None
        listed = ids.tolist()
        for state, row in zip(states, rows, strict=True):
            if listed[row] >= 0:
                state.record(listed[row])


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: list[int]) -> None:
    """-inf in these rows of logits [B, V] where bitmask [B, ceil(V / 32)] int32 has a 0."""
    if logits.device.type == CPU:
        from xgrammar.kernels.apply_token_bitmask_inplace_cpu import apply_token_bitmask_inplace_cpu

        apply_token_bitmask_inplace_cpu(logits, bitmask, logits.shape[1], rows)
        return
    some = bitmask[rows].to(logits.device)
    shifts = torch.arange(_BITS, dtype=torch.int32, device=logits.device)
    allowed = (some.unsqueeze(-1) >> shifts) & 1
    allowed = allowed.view(len(rows), -1)[:, : logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill_(~allowed, NEVER)
