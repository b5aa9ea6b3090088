# SPDX-License-Identifier: MIT
"""All meshes of so many ranks, each judged: the best above the floor, and why others are refused.

Best is most output tokens per minute and device while each user gets at least the floor.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed.planner.catalog import PlannedModel
from tokenspeed.planner.devices import Device
from tokenspeed.planner.estimate import Estimate, Load, estimate
from tokenspeed.planner.memory import DoesNotFitError
from tokenspeed.spmd.mesh import Mesh


@dataclass(frozen=True)
class Found:
    """`ranked`: estimates at the largest batch that keeps the floor, the best first.

    `slow`: meshes on which even one user is served below the floor. `refused`: why, how many.
    """

    ranked: tuple[Estimate, ...]
    slow: tuple[Estimate, ...]
    refused: Counter[str]


def search(
    planned: PlannedModel,
    device: Device,
    count: int,
    load: Load,
    tps_floor: float,
    *,
    fixed_batch: bool = False,
) -> Found:
    """Judges every mesh of `count` ranks for requests of the load's context.

    `fixed_batch`: at the load's batch, in place of the largest that keeps the floor.
    """
    least = load.batch if fixed_batch else 1
    ranked: list[Estimate] = []
    slow: list[Estimate] = []
    refused: Counter[str] = Counter()
    for sizes in _sizes(count):
        try:
            found = estimate(planned, Mesh(**sizes), device, load)
            found.with_batch(least).room.check(least, load.context)
        except DoesNotFitError:
            refused["does not fit in memory"] += 1
        except ValueError as error:
            refused[_reason(str(error))] += 1
        else:
            best = found if fixed_batch else largest_batch(found, tps_floor)
            (ranked if best.tps_per_user >= tps_floor else slow).append(best)
    ranked.sort(key=lambda each: -each.tokens_per_minute_per_device)
    slow.sort(key=lambda each: -each.tps_per_user)
    return Found(tuple(ranked), tuple(slow), refused)


def largest_batch(found: Estimate, tps_floor: float) -> Estimate:
    """The most requests that fit and leave each at least `tps_floor`; one if there are none.

    Batches are multiples of dp x pp, so that no rank idles; time grows with the batch.
    """
    unit = found.mesh.dp * found.mesh.pp
    capacity = found.with_batch(unit).room.concurrency(found.load.context) // unit
    low, high = 0, capacity
    while low < high:
        middle = (low + high + 1) // 2
        each = found.with_batch(middle * unit)
        fits = each.room.concurrency(found.load.context) >= middle * unit
        if fits and each.tps_per_user >= tps_floor:
            low = middle
        else:
            high = middle - 1
    return found.with_batch(low * unit or 1)


def _sizes(count: int) -> Iterator[dict[str, int]]:
    """Every (tp, dp, ep, pp) whose mesh would have `count` ranks."""
    for pp in _divisors(count):
        stage = count // pp
        for ep in _divisors(stage):
            for attention in _divisors(stage):
                if max(ep, attention) == stage:
                    for tp in _divisors(attention):
                        yield {"tp": tp, "dp": attention // tp, "ep": ep, "pp": pp}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _reason(message: str) -> str:
    """What kind of refusal a message is; the places it names differ from mesh to mesh."""
    for words, reason in (
        ("no whole .* blocks", "ranks would cut the blocks of quantised weights"),
        ("has no experts", "no experts for the axis ep"),
        ("key-value heads", "tp does not fit the key-value heads"),
        (r"\d experts", "ep does not divide the experts"),
        ("views of the same ranks", "attention and experts cannot share the ranks"),
        ("stages for", "more pipeline stages than layers"),
        ("heads of", "tp does not divide the heads"),
        ("cannot be divided", "a weight cannot be divided"),
    ):
        if re.search(words, message):
            return reason
    return message


def smallest_count(
    planned: PlannedModel, device: Device, load: Load, above: int, most: int = 256
) -> int | None:
    """The least power of two of devices, more than `above`, on which the load fits.

    Looks at meshes of one stage that divide experts over all ranks, and attention over a node.
    """
    room = device.memory_bytes - device.runtime_bytes
    count = 1
    while count <= most:
        enough = planned.weight_bytes <= count * room
        if enough and count > above and any(_fits(planned, device, load, s) for s in _wide(count)):
            return count
        count *= 2
    return None


def _wide(count: int) -> Iterator[dict[str, int]]:
    for tp in _divisors(min(count, 8)):
        for ep in (1, count):
            yield {"tp": tp, "dp": count // tp, "ep": ep}


def _fits(planned: PlannedModel, device: Device, load: Load, sizes: dict[str, int]) -> bool:
    try:
        estimate(planned, Mesh(**sizes), device, load).room.check(load.batch, load.context)
    except ValueError:
        return False
    return True
