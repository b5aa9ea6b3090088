# SPDX-License-Identifier: MIT
"""Block ids made into text of real words: one id and one seed are one text, everywhere.

Knows no tokenizer and no server: how many tokens a word has is told, or counted. A prompt's
tail is the beginning of the block that stands there in the next turn, and an answer is what that
turn's prompt says next, so that a replay with dictated answers repeats the recorded prefixes.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate

from tokenspeed.bench.session import Session, Turn, shared_blocks

# Common and short: nearly every vocabulary has each of them, with its space, as one token.
_WORDS = tuple(
    """able about above across add after again air all allow also always among and another answer
    any area arm around ask away back bad bank base be because become before begin behind best
    better between big bit black block blue board body book both box break bring build business but
    buy call can car care case catch cause center change check child choose city class clear close
    code cold color come common company control cost could country course court cover create cross
    cut dark data date day deal decide deep design do door down draw drive drop early east easy eat
    edge effect end energy enough even event ever every example eye face fact fall family far fast
    father feel few field figure fill film final find fine fire first fish five follow food foot
    for force form four free friend from full game garden general get girl give glass go good great
    green ground group grow half hand hard have head hear heart heat heavy help here high hold home
    hope horse hot hour house how hundred idea if in inside interest into issue item job join just
    keep key kind king know land language large last late law lay lead learn leave left less let
    letter level life light like line list little live local long look lose lot love low machine
    main make man many map mark market matter may mean meet member method middle might mind
    minute model moment money month more morning most mother mouth move much music must name
    near""".split()
)
CALIBRATION_WORDS = 4096

Message = tuple[str, str]  # "user" or "assistant", text


class Prompts:
    """The texts of a workload for a tokenizer that makes `tokens_per_word` of a word.

    Raises ValueError if that is no finite positive number.
    """

    def __init__(self, seed: int, tokens_per_word: float = 1.0) -> None:
        if not (math.isfinite(tokens_per_word) and tokens_per_word > 0):
            raise ValueError(f"tokens_per_word must be positive and finite, not {tokens_per_word}")
        self.seed, self.tokens_per_word = seed, tokens_per_word
        self._block = lru_cache(maxsize=1 << 16)(self._made)

    def text(self, session: Session, index: int) -> str:
        """The whole prompt of a turn."""
        return " ".join(self._prompt(session, index))

    def answer(self, session: Session, index: int) -> str:
        """About `output_tokens` tokens, at least one word: how the next prompt goes on, and more
        if that is short."""
        turn = session.turns[index]
        following = _continuation(session, index)
        words: list[str] = []
        if following is not None:
            start, end = self._places(following, session.block_size, turn.input_tokens, turn.total)
            words = self._prompt(session, index + 1)[start:end]
        missing = turn.output_tokens - round(len(words) * self.tokens_per_word)
        salt = f"answer {session.session_id} {index}"
        words += self._made(salt, max(0, missing))
        return " ".join(words or self._made(salt, math.ceil(self.tokens_per_word)))

    def conversation(self, session: Session, index: int) -> list[Message]:
        """The prompt as a client would send it: who said which part of `text`.

        A message ends where a turn's prompt or its answer ended. What a later prompt no longer
        shares (a compaction) keeps only the ends that lie in what it does share.
        """
        cuts: list[tuple[int, str]] = [(0, "user")]
        for i in range(index):
            before, after = session.turns[i], session.turns[i + 1]
            if _continuation(session, i) is None:
                kept = shared_blocks(before.prompt_blocks, after.prompt_blocks) * session.block_size
                cuts = [cut for cut in cuts if cut[0] < max(kept, 1)]
                cuts += [(kept, "user")] if cuts[-1][1] == "assistant" else []
            elif (end := min(before.total, after.input_tokens - 1)) > before.input_tokens:
                cuts += [(before.input_tokens, "assistant"), (end, "user")]
        turn, words = session.turns[index], self._prompt(session, index)
        starts = self._places(turn, session.block_size, *(place for place, _ in cuts))
        texts = (words[a:b] for a, b in zip(starts, [*starts[1:], len(words)], strict=True))
        said = zip((role for _, role in cuts), texts, strict=True)
        return _joined((role, " ".join(text)) for role, text in said if text)

    def _prompt(self, session: Session, index: int) -> list[str]:
        turn, size = session.turns[index], session.block_size
        words = [word for block in turn.prompt_blocks for word in self._block(block, size)]
        return [*words, *self._tail(session, index)]

    def _tail(self, session: Session, index: int) -> tuple[str, ...]:
        """Behind the last whole block: how the next prompt begins there, if it goes on."""
        turn, following = session.turns[index], _continuation(session, index)
        if turn.tail_tokens == 0:
            return ()
        if following is None:
            return self._made(f"tail {session.session_id} {index}", turn.tail_tokens)
        if len(following.prompt_blocks) > len(turn.prompt_blocks):
            block = following.prompt_blocks[len(turn.prompt_blocks)]
            there, tokens = self._block(block, session.block_size), session.block_size
        else:
            there, tokens = self._tail(session, index + 1), following.tail_tokens
        return there[: int(len(there) * turn.tail_tokens / tokens)]

    def _places(self, turn: Turn, size: int, *tokens: int) -> list[int]:
        """Before which word of the turn's prompt each of these tokens comes."""
        lengths = [len(self._block(block, size)) for block in turn.prompt_blocks]
        before = [0, *accumulate(lengths)]
        found = []
        for token in tokens:
            block, rest = divmod(token, size)
            if block < len(lengths):
                found.append(before[block] + int(lengths[block] * rest / size))
            else:
                found.append(before[-1] + int((token - len(lengths) * size) / self.tokens_per_word))
        return found

    def _made(self, what: int | str, num_tokens: int) -> tuple[str, ...]:
        """As many words as make `num_tokens`: rounded at random, so that many blocks keep it."""
        key = f"{self.seed} {what}".encode()
        dither = int.from_bytes(blake2b(key, digest_size=4, person=b"length").digest()) / 2**32
        num_words = int(num_tokens / self.tokens_per_word + dither)
        chosen = b"".join(
            blake2b(key, digest_size=64, salt=part.to_bytes(8)).digest()
            for part in range(-(-num_words // 64))
        )
        return tuple(_WORDS[byte] for byte in chosen[:num_words])


def _continuation(session: Session, index: int) -> Turn | None:
    """The next turn, if its prompt goes on from this one's."""
    if index + 1 == len(session.turns):
        return None
    turn, after = session.turns[index], session.turns[index + 1]
    longer = after.input_tokens >= turn.input_tokens
    whole = shared_blocks(turn.prompt_blocks, after.prompt_blocks) == len(turn.prompt_blocks)
    return after if longer and whole else None


def _joined(messages: Iterator[Message]) -> list[Message]:
    """Neighbours of one role are one message."""
    found: list[Message] = []
    for role, text in messages:
        if found and found[-1][0] == role:
            found[-1] = (role, f"{found[-1][1]} {text}")
        else:
            found.append((role, text))
    return found


def calibration_text() -> str:
    """A long text of these words, to count its tokens."""
    return " ".join(Prompts(0)._made("calibration", CALIBRATION_WORDS))


def calibrated(num_tokens: int) -> float:
    """The tokens of a word of these texts where `calibration_text` has `num_tokens`.

    Raises ValueError where it has none.
    """
    if num_tokens <= 0:
        raise ValueError(f"the tokenizer finds no token in a text of {CALIBRATION_WORDS} words")
    return num_tokens / CALIBRATION_WORDS
