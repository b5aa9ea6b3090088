# SPDX-License-Identifier: MIT
"""When the turns of a session would be sent and end on a server of a given speed.

For what needs times before anything is measured: caches that forget, files that want timestamps.
Knows no server; the speed is what clients of hosted models see.
"""

from dataclasses import dataclass

from tokenspeed.bench.session import Session


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast answers come: 62 tokens per second is the mean of 4,123 recorded requests."""

    first_token_s: float = 2.0
    tokens_per_s: float = 62.0

    def answer_s(self, output_tokens: int) -> float:
        return self.first_token_s + output_tokens / self.tokens_per_s


TYPICAL = Pace()


def turn_times(session: Session, pace: Pace = TYPICAL) -> list[tuple[float, float]]:
    """Of each turn when it is sent and when its answer ends, from the workload's start."""
    now, found = session.start_s, []
    for turn in session.turns:
        sent = now + turn.gap_s
        now = sent + pace.answer_s(turn.cancel_after or turn.output_tokens)
        found.append((sent, now))
    return found
