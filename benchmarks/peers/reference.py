# SPDX-License-Identifier: MIT
"""Logits that all engines are held against: transformers in float32, on the same bf16 weights.

Computed once a model, in a process of its own, and kept in the folder of peers.

    reference.py MODEL_FOLDER OUT_FILE
"""

import json
import random
import subprocess
import sys
from pathlib import Path

LENGTHS = (32, 64, 96, 128, 256, 512)
SEED = 4


def prompts() -> list[list[int]]:
    """The fixed prompts."""
    rng = random.Random(SEED)
    return [[rng.randrange(1, 32768) for _ in range(length)] for length in LENGTHS]


def logits(model: Path) -> list[list[float]]:
    """For each prompt the logits of the token after it."""
    out = model / f"reference-{SEED}-{'-'.join(map(str, LENGTHS))}.json"
    if not out.exists():
        command = [sys.executable, __file__, str(model), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: list[list[float]] = json.loads(out.read_text())
    return found


def main(model: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        rows = [loaded(torch.tensor([prompt])).logits[0, -1].tolist() for prompt in prompts()]
    part = Path(out).with_suffix(".part")
    part.write_text(json.dumps(rows))
    part.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
