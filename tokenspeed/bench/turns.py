# SPDX-License-Identifier: MIT
"""What became of each turn of a run, however often it was sent. Knows records; no times, no rates.

A turn that was refused may be sent again, so requests are more than turns: a turn is what its last
request was. One that was still to be sent again when the run ended is a refused one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenspeed.bench.records import RequestRecord, Run


@dataclass(frozen=True, slots=True)
class Turns:
    """Numbers of turns. `planned`: of the workload; None where the run does not tell."""

    planned: int | None
    sent: int
    answered: int
    hung_up: int  # tokens came, then the client left: the workload says so, or the run was over
    refused: int
    failed: int
    cut_off: int  # the run was over before the first token

    @property
    def unanswered(self) -> int:
        return self.refused + self.failed + self.cut_off


def turns_of(run: Run) -> Turns:
    """Every turn that was sent is one of the five kinds."""
    kinds = list(_kinds(run.records))
    return Turns(
        planned=run.num_turns,
        sent=len(kinds),
        answered=kinds.count("ok"),
        hung_up=kinds.count("hung up"),
        refused=kinds.count("refused"),
        failed=kinds.count("error"),
        cut_off=kinds.count("cut off"),
    )


def _kinds(records: Iterable[RequestRecord]) -> Iterable[str]:
    last = {(record.session_id, record.turn): record for record in records}
    for record in last.values():
        if record.status != "cancelled":
            yield record.status
        else:
            yield "hung up" if record.token_times else "cut off"
