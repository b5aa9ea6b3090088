# SPDX-License-Identifier: MIT
"""`DraftCounts`: what came of drafts, by drafter and place. Knows no request and no method."""

from collections.abc import Sequence

from tokenspeed.engine.messages import DrafterStats


def num_accepted(draft: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading tokens of a draft are the ids that a row gave.

    This holds where a stop id ended the request amid them, too: what is behind it is dropped.
    """
    count = 0
    for guess, token in zip(draft, ids, strict=False):
        if guess != token:
            break
        count += 1
    return count


class DraftCounts:
    """Counts since the start. `record` is called once for each verified draft."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_drafts = self._num_tokens = 0
        self._kept: list[int] = []  # drafts of which exactly so many tokens, and 1, were kept

    def record(self, num_draft: int, accepted: int) -> None:
        """Of a draft of `num_draft` tokens the first `accepted` were what came."""
        self._num_drafts += 1
        self._num_tokens += num_draft
        if num_draft > len(self._kept):
            self._kept += [0] * (num_draft - len(self._kept))
        if accepted:
            self._kept[accepted - 1] += 1

    def stats(self) -> DrafterStats:
        """`accepted_per_pos[i]` counts the drafts of which the token at place i was kept."""
        per_pos, above = [], 0
        for count in reversed(self._kept):
            above += count
            per_pos.append(above)
        per_pos.reverse()
        return DrafterStats(self._name, self._num_drafts, self._num_tokens, sum(per_pos), per_pos)
