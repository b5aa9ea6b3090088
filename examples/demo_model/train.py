# SPDX-License-Identifier: MIT
"""Trains the demo model on the CPU for a number of minutes and keeps a loss curve.

Muon for the hidden matrices, AdamW for the rest; the learning rate is constant, then falls to
zero at the wall-clock deadline. Refuses to know about file formats other than its own checkpoint.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import streams
import torch
import workers
from model import EMBEDDING_SCALE, DemoModel, Router, is_head_norm
from shape import Shape
from torch import Tensor, nn

HERE = Path(__file__).parent
ROWS, LENGTH, MICRO_BATCHES = 8, 512, 2
LONG_ROWS, LONG_LENGTH, LONG_EVERY = 1, 4096, 16  # a long step keeps long prompts in distribution
VALIDATE_EVERY = 250
WARMUP_STEPS, DECAY_FROM = 50, 0.5  # the decay starts at this share of the time budget
MUON_LR, ADAM_LR, BIAS_RATE, MTP_WEIGHT = 0.02, 3e-3, 1e-3, 0.2


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    hidden: list[nn.Parameter] = []
    rest: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight") or "proj_with_mqa" in name:
            hidden.append(parameter)
            continue
        scale = 1.0
        if "embed_tokens" in name:
            scale = EMBEDDING_SCALE
        elif is_head_norm(name):
            scale = 1 / EMBEDDING_SCALE
        rest.append({"params": [parameter], "lr": ADAM_LR * scale})
    muon = torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.1, momentum=0.95)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def lr_factor(step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


class Trainer:
    """The model, its optimizers and the streams; one `step` is one update."""

    def __init__(self, tokens: dict[str, streams.Stream], seed: int) -> None:
        torch.manual_seed(seed)
        self.model = DemoModel(Shape.read(HERE / "config.json"))
        self.loss = torch.compile(self.model, dynamic=False)
        self.optimizers = build_optimizers(self.model)
        self.routers = [m for m in self.model.modules() if isinstance(m, Router)]
        self.tokens, self.rng = tokens, np.random.default_rng([seed, workers.rank()])

    def step(self, factor: float, long: bool, clock: Tensor) -> tuple[float, float, int]:
        """Returns the main and the MTP loss and the number of tokens; averages the clock too."""
        rows, length = (LONG_ROWS, LONG_LENGTH) if long else (ROWS, LENGTH)
        micro_batches = MICRO_BATCHES // workers.count()
        totals = torch.zeros(2)
        for router in self.routers:
            router.load.zero_()
        for _ in range(micro_batches):
            batch = streams.sample_rows(self.tokens, self.rng, rows, length + 2)
            main, mtp = self.losses(batch)
            torch.autograd.backward((main + MTP_WEIGHT * mtp) / micro_batches)
            totals += torch.stack([main.detach(), mtp.detach()]) / micro_batches
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        workers.average([*gradients, *(r.load for r in self.routers), totals, clock])
        self.update(factor)
        return totals[0].item(), totals[1].item(), rows * length * MICRO_BATCHES

    def update(self, factor: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        for router in self.routers:  # auxiliary-loss-free balancing, arXiv:2408.15664
            error = router.load.mean() - router.load
            router.e_score_correction_bias += BIAS_RATE * factor * error.sign()

    def losses(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            main, mtp = self.loss(batch)
        return main, mtp

    @torch.no_grad()
    def validate(self, kind: str, batches: int = 4) -> float:
        rows = streams.even_rows(self.tokens[f"{kind}-validation"], ROWS * batches, LENGTH + 2)
        losses = [self.losses(batch)[0] for batch in torch.split(rows, ROWS)]
        return torch.stack(losses).mean().item()

    def imbalance(self) -> float:
        """The busiest expert's load over the mean, in the worst layer; 1 is perfect."""
        return max((r.load.max() / r.load.mean()).item() for r in self.routers)


def train(trainer: Trainer, out: Path, budget: float) -> None:
    """Runs for `budget` minutes. The clock is the workers' mean, so that all stop together."""
    start = time.monotonic()
    step, seen, saved, clock = 0, 0, 0.0, torch.zeros(1)
    while (minutes := clock.item()) < budget:
        factor = lr_factor(step, minutes / budget)
        clock.fill_((time.monotonic() - start) / 60)
        main_loss, mtp_loss, count = trainer.step(
            factor, step % LONG_EVERY == LONG_EVERY - 1, clock
        )
        seen += count
        record = {"step": step, "minutes": minutes, "tokens": seen, "lr": factor}
        record |= {"train": main_loss, "mtp": mtp_loss, "imbalance": trainer.imbalance()}
        if workers.rank() == 0:
            if step % VALIDATE_EVERY == 0:
                record |= {f"val_{k}": trainer.validate(k) for k in ("library", "chat")}
            if minutes - saved > 5 or step == 20:
                saved = minutes
                torch.save(trainer.model.state_dict(), out / "checkpoint.pt")
            with (out / "loss.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        step += 1
    if workers.rank() == 0:
        torch.save(trainer.model.state_dict(), out / "checkpoint.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workers.join()
    trainer = Trainer(streams.load(args.tokenizer, args.out), seed=0)
    train(trainer, args.out, args.minutes)
    workers.leave()


if __name__ == "__main__":
    main()
