# SPDX-License-Identifier: MIT
"""What each rank reads of a checkpoint, counted by the loader, by the kernel and at the disk.

Writes random checkpoints, then loads every rank of a mesh, one after the other, and nothing runs.
`read` is what `read` calls returned by the kernel's count; `disk` what the device delivered with
none of the file cached, readahead included; `disk, after` the same while ranks before it have left
their pages in the cache, as ranks of one machine do. Knows files, ranks and no collectives.

    python benchmarks/loading.py [--folder /tmp/loading] [--json FILE]
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from tokenspeed.models.build import Ranks, build_model, load_with_report
from tokenspeed.models.load_report import LoadReport
from tokenspeed.models.tensor_check import wanted_sources
from tokenspeed.spmd.group import Communicator, Group
from tokenspeed.spmd.mesh import Mesh

CPU = torch.device("cpu")
COMMON = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "dense": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "latent, experts": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1024,
        "first_k_dense_replace": 1,
    },
}
CASES = [
    ("dense", "tp=2"),
    ("dense", "tp=4"),
    ("dense", "tp=2,pp=2"),
    ("latent, experts", "tp=4"),
    ("latent, experts", "tp=4,ep=4"),
    ("latent, experts", "dp=4,ep=4"),
]


class Members:
    """A group that is asked who is in it, and nothing else."""

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self.ranks, self.index = ranks, ranks.index(rank)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this rank only loads")


class Silent:
    """A communicator for ranks that only load."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def group(self, partition: Sequence[tuple[int, ...]]) -> Group:
        own = next(ranks for ranks in partition if self.rank in ranks)
        return cast(Group, Members(own, self.rank))

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Row:
    """One rank's load, in bytes and seconds."""

    model: str
    mesh: str
    rank: int
    total: int
    read: int
    picked: int
    whole: int
    disk: int
    disk_after: int
    seconds: float

    @property
    def share(self) -> float:
        """Of what is not held whole."""
        return (self.picked - self.whole) / (self.total - self.whole)

    def __str__(self) -> str:
        sizes = (self.total, self.read, self.whole, self.disk, self.disk_after)
        columns = "".join(f"{size / 1e6:12.2f}" for size in sizes)
        head = f"{self.model:16} {self.mesh:10} {self.rank:4}"
        return f"{head}{columns}{self.share:9.4f}{self.seconds:8.2f}"


HEADER = (
    f"{'model':16} {'mesh':10} rank    total MB     read MB    whole MB     disk MB"
    "  disk,after    share       s"
)


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Random tensors of the names and shapes that the model asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = build_model(folder, None, CPU)
    shapes = {n: s.shape for part in wanted_sources(model, "").values() for n, s in part.items()}
    tensors = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def counter(name: str) -> int:
    """One line of what Linux counts of this process's input and output."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines[name])


def forget(path: Path) -> None:
    """Drops the file's pages from the cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def load(folder: Path, mesh: Mesh, rank: int) -> LoadReport:
    communicator: Communicator = Silent(rank, mesh.num_ranks)
    return load_with_report(folder, None, CPU, ranks=Ranks(mesh, rank, communicator))[1]


def measure(folder: Path, name: str, text: str) -> list[Row]:
    mesh, path = Mesh.parse(text), folder / "model.safetensors"
    after = []
    forget(path)
    for rank in range(mesh.num_ranks):
        before = counter("read_bytes")
        load(folder, mesh, rank)
        after.append(counter("read_bytes") - before)
    rows = []
    for rank in range(mesh.num_ranks):
        forget(path)
        disk, read, start = counter("read_bytes"), counter("rchar"), time.perf_counter()
        report = load(folder, mesh, rank)
        seconds, read = time.perf_counter() - start, counter("rchar") - read
        rows.append(
            Row(
                name,
                text,
                rank,
                report.num_bytes_total,
                read,
                report.num_bytes_picked,
                report.num_bytes_whole,
                counter("read_bytes") - disk,
                after[rank],
                seconds,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tokenspeed_loading"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name, config in MODELS.items():
        write_checkpoint(options.folder / name, config)
    rows = []
    print(HEADER)
    for name, text in CASES:
        for row in measure(options.folder / name, name, text):
            print(row, flush=True)
            rows.append(row)
    if options.json:
        rounded = [asdict(row) | {"seconds": round(row.seconds, 3)} for row in rows]
        options.json.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
