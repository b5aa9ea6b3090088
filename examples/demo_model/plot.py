# SPDX-License-Identifier: MIT
"""Draws a loss curve: `python plot.py LOSS_JSONL OUT_PNG`. Refuses to know how it came about."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    out, mean = [], values[0]
    for value in values:
        mean = weight * mean + (1 - weight) * value
        out.append(mean)
    return out


def main(log: Path, out: Path) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    millions = [r["tokens"] / 1e6 for r in records]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("train", "training"), ("mtp", "training, MTP layer")):
        axes.plot(millions, smooth([r[key] for r in records]), label=label, linewidth=1)
    for key, label in (("val_library", "held-out library"), ("val_chat", "held-out chats")):
        marks = [(m, r[key]) for m, r in zip(millions, records, strict=True) if key in r]
        axes.plot(*zip(*marks, strict=True), label=label, marker=".")
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(0, 7))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
