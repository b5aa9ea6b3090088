# SPDX-License-Identifier: MIT
"""Loading on many ranks: each reads its share, together they read all, and every error is local."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import FAMILIES, make_checkpoint
from tests.unit.test_loader import edit_config, edit_tensors
from tests.unit.test_loader_pieces import bytes_read_by_this_process
from tokenspeed.errors import ModelLoadError
from tokenspeed.models.build import Ranks, load_with_report
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.load_report import LoadReport
from tokenspeed.models.tensor_check import wanted_sources
from tokenspeed.spmd.group import Group
from tokenspeed.spmd.mesh import Mesh

pytestmark = pytest.mark.usefixtures("plain_weights")

CPU = torch.device("cpu")
MESHES = ("tp=4", "tp=2,pp=2", "dp=2,tp=2", "dp=2,ep=4", "tp=2,ep=2")


class Members:
    """A group that can say who is in it; nobody calls it while weights are loaded."""

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self.ranks, self.index = ranks, ranks.index(rank)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is summed while weights are loaded")


class Silent:
    """A communicator for ranks that only load."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def group(self, partition: Sequence[tuple[int, ...]]) -> Group:
        own = next(ranks for ranks in partition if self.rank in ranks)
        return Members(own, self.rank)  # type: ignore[return-value]

    def close(self) -> None:
        pass


def load(folder: Path, mesh: Mesh, rank: int, redundant: int = 0) -> tuple[CausalLM, LoadReport]:
    ranks = Ranks(mesh, rank, Silent(rank, mesh.num_ranks), num_redundant_experts=redundant)
    return load_with_report(folder, None, CPU, ranks=ranks)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_read_every_element(family: str, tmp_path: Path) -> None:
    """And each rank's parameters hold exactly what it picked."""
    make_checkpoint(tmp_path, family)
    whole = load_file(tmp_path / "model.safetensors")
    sparse = FAMILIES[family]().to_dict().keys() & {"n_routed_experts", "num_local_experts"}
    for text in MESHES:
        mesh = Mesh.parse(text)
        if mesh.ep > 1 and not sparse:
            continue
        seen = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in whole.items()}
        for rank in range(mesh.num_ranks):
            model, report = load(tmp_path, mesh, rank)
            held = torch.cat([p.double().flatten() for p in model.parameters()]).sort().values
            picked = []
            for sources in wanted_sources(model, "").values():
                for name, source in sources.items():
                    if source.pick is not None:
                        seen[name][source.pick] = True
                        picked.append(whole[name][source.pick].double().flatten())
            assert torch.equal(held, torch.cat(picked).sort().values), (text, rank)
            assert report.num_bytes_picked == sum(p.numel() * 4 for p in picked)
            assert report.num_bytes_total == sum(t.nbytes for t in whole.values()) - sum(
                whole[name].nbytes for name in report.set_aside
            )
            for name in report.set_aside:
                seen[name][:] = True
        assert all(bool(mask.all()) for mask in seen.values()), text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows long enough that a quarter of each is worth a read of its own."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 1}
    return make_checkpoint(tmp_path_factory.mktemp("wide"), "qwen3", **sizes, **heads)


@pytest.mark.parametrize("rank", range(4))
def test_a_quarter_of_the_bytes_at_tp_4(wide: Path, rank: int) -> None:
    before = bytes_read_by_this_process()
    report = load(wide, Mesh(tp=4), rank)[1]
    count = bytes_read_by_this_process() - before
    norms = 4 * (3 * 512 + 2 * 64)
    assert report.num_bytes_whole == norms
    assert report.num_bytes == report.num_bytes_picked
    assert report.num_bytes - norms == (report.num_bytes_total - norms) / 4
    assert 0 <= count - report.num_bytes < 0.01 * report.num_bytes_total  # headers, config.json
    assert report.num_bytes < 0.2575 * report.num_bytes_total
    assert report.num_bytes_picked < report.num_bytes_touched < report.num_bytes_total
    assert f"rank {rank} of 4 read 7.35 MB of 29.37 MB, 0.01 MB of it in modules" in str(report)


def test_fewer_key_value_heads_than_ranks(tmp_path: Path) -> None:
    """Two ranks read each head: half of k and v, a quarter of all else."""
    make_checkpoint(tmp_path, "qwen3")
    model = load(tmp_path, Mesh(tp=4), 3)[0]
    tensors = load_file(tmp_path / "model.safetensors")
    found = model.get_parameter("model.layers.1.self_attn.qkv_proj.weight")
    q, k, v = (tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(found, torch.cat([q[96:], k[32:], v[32:]]))


def test_a_bias_that_is_added_once(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    first, second = (load(tmp_path, Mesh(tp=2), rank)[0] for rank in (0, 1))
    path = "model.layers.0.mlp.down_proj.bias"
    assert path in dict(first.named_parameters())
    assert path not in dict(second.named_parameters())


def test_redundant_experts_are_read_by_each_holder(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    for rank in range(2):
        model = load(tmp_path, Mesh(ep=2), rank, redundant=2)[0]
        experts = model.get_submodule("model.layers.0.mlp.experts")
        held = [(4 * rank + i) % 8 for i in range(5)]
        down = [tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in held]
        assert torch.equal(experts.get_parameter("w2"), torch.stack(down))


def test_every_rank_finds_a_wrong_tensor_that_it_would_not_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    edit_tensors(tmp_path, model__layers__0__mlp__experts__7__up_proj__weight=torch.zeros(3, 3))
    for rank in range(2):
        with pytest.raises(ModelLoadError, match=rf"rank {rank} of 2: .*experts\.7\.up_proj"):
            load(tmp_path, Mesh(ep=2), rank)
    edit_tensors(tmp_path, model__layers__0__mlp__experts__7__up_proj__weight=None)
    for rank in range(2):
        with pytest.raises(ModelLoadError, match=rf"rank {rank} of 2: .* lacks 1 tensor"):
            load(tmp_path, Mesh(ep=2), rank)


def test_every_stage_finds_an_unknown_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    edit_tensors(tmp_path, model__layers__0__strange=torch.zeros(1))
    for rank in range(2):
        with pytest.raises(ModelLoadError, match=r"no place for 1 tensor.*layers\.0\.strange"):
            load(tmp_path, Mesh(pp=2), rank)


def make_fp8(folder: Path, block: tuple[int, int]) -> None:
    """Qwen3 with its down projections in FP8 blocks."""
    make_checkpoint(folder, "qwen3")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("down_proj.weight")]:
        rows, columns = (-(-s // b) for s, b in zip(tensors[name].shape, block, strict=True))
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.rand(rows, columns) + 0.5
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    edit_config(folder, quantization_config=quantization)


def test_fp8_blocks_over_ranks(tmp_path: Path) -> None:
    make_fp8(tmp_path, (16, 24))
    whole = load(tmp_path, Mesh(), 0)[0].get_parameter("model.layers.1.mlp.down_proj.weight")
    for rank in range(4):
        model, report = load(tmp_path, Mesh(tp=4), rank)
        part = model.get_parameter("model.layers.1.mlp.down_proj.weight")
        assert torch.equal(part, whole[:, 24 * rank : 24 * (rank + 1)])
        assert report.num_bytes_picked < report.num_bytes_total / 3


def test_fp8_blocks_that_the_ranks_would_cut(tmp_path: Path) -> None:
    make_fp8(tmp_path, (16, 32))
    message = (
        r"rank 1 of 4: model\.layers\.0\.mlp\.down_proj\.weight: columns 24 to 48 of 96, "
        r"divided over 4 ranks, are not whole FP8 blocks of 32; use fewer ranks"
    )
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path, Mesh(tp=4), 1)
