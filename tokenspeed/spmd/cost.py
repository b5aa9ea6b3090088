# SPDX-License-Identifier: MIT
"""What a collective costs: a start-up time for each exchange and bytes over bandwidth.

The alpha-beta model of Hockney (Parallel Computing 20, 1994) for ranks that reach each other
directly (NVLink switch, a full mesh, shared memory): in one exchange a rank talks to all others
at once, and its own link is what limits it. Knows no devices; refuses to guess congestion.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interconnect:
    """The wire between the ranks of a group.

    `latency_s` seconds start every exchange (launch and synchronisation included); `bandwidth`
    bytes per second leave one rank, in one direction. Sizes below are bytes of the *whole* tensor:
    what an all-reduce gets, what an all-gather gives, what a reduce-scatter gets.
    """

    latency_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not self.latency_s >= 0 or not self.bandwidth > 0:
            raise ValueError(f"latency must be at least 0 and bandwidth more than 0: {self}")

    def all_reduce_s(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds. The better of one exchange of everything and reduce-scatter + all-gather."""
        once = self._exchange_s(num_bytes * (num_ranks - 1), num_ranks)
        twice = self.reduce_scatter_s(num_bytes, num_ranks) + self.all_gather_s(
            num_bytes, num_ranks
        )
        return min(once, twice)

    def all_gather_s(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds; each rank sends its piece to all others."""
        return self._exchange_s(num_bytes * (num_ranks - 1) / num_ranks, num_ranks)

    def reduce_scatter_s(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds; each rank sends every other one its piece to sum."""
        return self._exchange_s(num_bytes * (num_ranks - 1) / num_ranks, num_ranks)

    def all_to_all_s(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds; `num_bytes` is what one rank holds before, evenly meant for all ranks."""
        return self._exchange_s(num_bytes * (num_ranks - 1) / num_ranks, num_ranks)

    def send_s(self, num_bytes: float) -> float:
        """Seconds from one rank to one other."""
        return self.latency_s + num_bytes / self.bandwidth

    def _exchange_s(self, sent: float, num_ranks: int) -> float:
        """One exchange in which every rank sends `sent` bytes. A group of one does nothing."""
        return self.latency_s + sent / self.bandwidth if num_ranks > 1 else 0.0
