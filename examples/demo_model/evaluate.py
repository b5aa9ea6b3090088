# SPDX-License-Identifier: MIT
"""Held-out losses of an exported model folder: `python evaluate.py MODEL_DIR CACHE`.

Nats per token, bits per byte, the loss by position in a long row, and how often the MTP layer
drafts the token that the main model would choose. Refuses to know about training.
"""

import math
import sys
from pathlib import Path

import streams
import torch
from model import DemoModel
from safetensors.torch import load_file
from shape import Shape
from torch import Tensor
from torch.nn.functional import cross_entropy

LENGTH = 2048


@torch.no_grad()
def token_losses(model: DemoModel, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, length + 2] ids to losses [rows, length] and drafts that agree [rows, length - 1]."""
    losses, agreements = [], []
    for row in torch.split(rows, 1):
        hidden, draft = model.model(row[:, :-1])
        head = model.model.embed_tokens.weight.T
        logits = hidden @ head
        losses.append(cross_entropy(logits[0], row[0, 1:-1], reduction="none"))
        agreements.append((draft[:, :-1] @ head).argmax(-1)[0] == logits[:, 1:].argmax(-1)[0])
    return torch.stack(losses), torch.stack(agreements)


def main(model_dir: Path, cache: Path) -> None:
    model = DemoModel(Shape.read(model_dir / "config.json"))
    model.load_state_dict(load_file(model_dir / "model.safetensors"))
    tokens = streams.load(model_dir, cache)
    for kind in streams.MIXTURE:
        stream = tokens[f"{kind}-validation"]
        bytes_per_token = float(tokens[f"{kind}-validation-bytes"]) / len(stream)
        rows = streams.even_rows(stream, min(24, len(stream) // LENGTH), LENGTH + 2)
        losses, agreements = token_losses(model, rows)
        nats = losses.mean().item()
        bits = nats / math.log(2) / bytes_per_token
        accepted = agreements.float().mean().item()
        print(f"{kind}: {nats:.3f} nats/token, {bits:.3f} bits/byte, drafts agree {accepted:.1%}")
    rows = streams.even_rows(tokens["library-validation"], 8, 8194)
    places = token_losses(model, rows)[0].view(8, 8, 1024).mean((0, 2))
    print("by position, per 1024 tokens: " + " ".join(f"{x:.2f}" for x in places.tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
