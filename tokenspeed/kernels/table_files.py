# SPDX-License-Identifier: MIT
"""Tables of measured times as JSON files: the shipped ones, and the user's own, which come first.

A file holds for one machine and the versions that it names; what was measured with other versions
is ignored and reported. Knows no op.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenspeed.config import cache_folder
from tokenspeed.kernels.device import UNKNOWN, Machine, arch_of, this_machine
from tokenspeed.kernels.table import Times

INFINITE = float("inf")
FORMAT = 1
MEASURED_DEVICES = ("cpu", "cuda")
SHIPPED = Path(__file__).parent.parent / "assets" / "kernels"

Key = tuple[str, str, tuple[tuple[str, int], ...]]  # op, dtype, sizes in the order of their names


@dataclass(frozen=True)
class TableFile:
    """The rows of one machine."""

    machine: Machine
    rows: dict[Key, dict[int, dict[str, float]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        rows = [
            {"op": op, "dtype": dtype, "shapes": dict(shapes), "times_us": times}
            for (op, dtype, shapes), times in sorted(self.rows.items())
        ]
        head = {"format": FORMAT, "machine": asdict(self.machine)}
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n  {lines}\n]}}\n', "utf-8")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> "TableFile":
        """`ValueError`: the file is none of ours."""
        try:
            document = json.loads(path.read_text("utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}, not {FORMAT}")
            machine = Machine(**document["machine"])
            if not isinstance(machine.versions, dict):
                raise TypeError("versions are not by name")
            return cls(machine, dict(_row(row) for row in document["rows"]))
        except (OSError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _row(row: Mapping[str, Any]) -> tuple[Key, dict[int, dict[str, float]]]:
    times = {
        int(bucket): {n: float(t) for n, t in of.items()} for bucket, of in row["times_us"].items()
    }
    if not times or any(not 0 < t < INFINITE for of in times.values() for t in of.values()):
        raise ValueError(f"times of {row['op']} must be above 0")
    if min(times) < 0:
        raise ValueError(f"tokens of {row['op']} must not be below 0")
    return key_of(row["op"], row["dtype"], row["shapes"]), times


def key_of(op: str, dtype: object, shapes: Mapping[str, int]) -> Key:
    """What a row is found by."""
    return op, str(dtype).removeprefix("torch."), tuple(sorted(shapes.items()))


def user_folder() -> Path:
    """Where `tokenspeed kernels tune` writes."""
    return cache_folder() / "kernels"


def file_name(machine: Machine) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", f"{machine.name} {machine.arch}".lower())
    return words.strip("-") + ".json"


class Tables:
    """What the folders' files say of the devices that are present. Later folders come first.

    Files are read once for each device type, when it is first asked about.
    """

    def __init__(self, folders: Sequence[Path] | None = None) -> None:
        self._folders = folders  # None: the shipped files, then the user's
        self._rows: dict[str, dict[Key, dict[int, dict[str, float]]]] = {}
        self.ignored: dict[str, str] = {}  # file -> why

    def times(
        self, op: str, device: str, arch: str, dtype: object, shapes: Mapping[str, int]
    ) -> Times:
        """Empty: nothing was measured, or the device is not here."""
        if arch == UNKNOWN or arch != arch_of(device):
            return {}
        if device not in self._rows:
            self._rows[device] = self._load(device)
        return self._rows[device].get(key_of(op, dtype, shapes), {})

    def _load(self, device: str) -> dict[Key, dict[int, dict[str, float]]]:
        folders = (SHIPPED, user_folder()) if self._folders is None else self._folders
        files = [path for folder in folders for path in sorted(folder.glob("*.json"))]
        rows: dict[Key, dict[int, dict[str, float]]] = {}
        if not files or device not in MEASURED_DEVICES:
            return rows
        machine = this_machine(device)
        for path in files:
            try:
                found = TableFile.read(path)
            except ValueError as error:
                self.ignored[str(path)] = str(error)
                continue
            if (found.machine.name, found.machine.arch) != (machine.name, machine.arch):
                continue  # another machine's
            if found.machine.versions != machine.versions:
                self.ignored[str(path)] = _difference(found.machine.versions, machine.versions)
            else:
                rows |= found.rows
        return rows


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = sorted(n for n in then.keys() | now.keys() if then.get(n) != now.get(n))
    measured = ", ".join(f"{n} {then.get(n, 'none')}" for n in names)
    return f"measured with {measured}; here is {', '.join(now.get(n, 'none') for n in names)}"
