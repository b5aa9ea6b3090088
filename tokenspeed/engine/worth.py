# SPDX-License-Identifier: MIT
"""`Worth`: whether it is worth while to look for a draft where so many tokens match.

Looking and choosing take time, and most short matches give nothing that is taken: after some in
vain, a kind of match is looked at now and then only. Knows lengths; refuses to know requests.
"""

from typing import Final

KINDS: Final = 8  # matches of 0, 1, 2-3, 4-7, .. tokens; the last stands for all behind it
# A kind of match has so much patience at most. A look in vain costs 1, one that gives a draft
# brings `TIMES`. With none left, one match in `RETRIED` is looked at.
PATIENCE: Final = 48
TIMES: Final = 12
RETRIED: Final = 16


class Worth:
    """tries -> found, where something was found."""

    def __init__(self) -> None:
        self._patience = [PATIENCE] * KINDS
        self._num_passed = [0] * KINDS

    def tries(self, match_len: int) -> bool:
        """Whether to look for a draft."""
        kind = min(match_len.bit_length(), KINDS - 1)
        if self._patience[kind]:
            return True
        self._num_passed[kind] += 1
        return self._num_passed[kind] % RETRIED == 0

    def found(self, match_len: int, *, is_taken: bool) -> None:
        """There was a draft, and some of it or nothing was chosen."""
        kind = min(match_len.bit_length(), KINDS - 1)
        left = self._patience[kind] + (TIMES if is_taken else -1)
        self._patience[kind] = min(max(left, 0), PATIENCE)
