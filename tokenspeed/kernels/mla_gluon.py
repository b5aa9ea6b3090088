# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-call"
"""Latent attention on Hopper: what is launched for the ops `attention_mla` and `attention_mla_up`.

Two kernels a call: the pages (`mla_decode_gluon.py`, `mla_decode_fp8_gluon.py`) and the merge
(`mla_combine_gluon.py`). Both derive the same schedule on the device; the host knows the numbers of
tokens, rows and heads alone, so that a captured graph serves every length. `q_start`, `kv_len` and
`w_uv` are read before the kernel ahead has ended: they must be older than that one. Refuses to know
layers and what it would cost elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tokenspeed.kernels.kv_fp8 import ROW_BYTES
from tokenspeed.kernels.mla_combine_gluon import mla_combine, mla_combine_up
from tokenspeed.kernels.mla_decode_fp8_gluon import mla_decode_fp8
from tokenspeed.kernels.mla_decode_gluon import mla_decode
from tokenspeed.kernels.mla_shared_gluon import common_pages, walk_groups
from tokenspeed.kernels.registry import REGISTRY, Ask, Kernel, register
from tokenspeed.kernels.triton_launch import num_units

LATENT, ROPE, TILE = 512, 64, 64
LOG2E = 1.4426950408889634
ARCH = "sm_90"
# Query rows of a block -> (warps, stages of the ring).
BFLOAT16_BLOCKS = {16: (4, 2), 32: (4, 2), 64: (8, 2)}
FLOAT8_BLOCKS = {16: (4, 3), 32: (8, 2)}
UP_PIECE = 32  # values of a program
UP_MAX_TOKENS, UP_GROUPS = 64, 16  # of the merge with the value projection
MERGE_WARPS = 8


@dataclass(frozen=True)
class Call:
    """A kernel with its grid and arguments, on the way to the device."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def launch(call: Call) -> None:
    """Sends a call to the device of its tensors."""
    warps = {"num_warps": call.constants["WARPS"], "launch_pdl": True}
    call.kernel[call.grid](*call.arguments, **call.constants, **warps, **call.options)


@dataclass(frozen=True)
class Batch:
    """The tables of a step, and how its query rows are cut."""

    page_table: Tensor
    slots: Tensor
    q_start: Tensor
    kv_len: Tensor
    num_tokens: int
    heads: int
    block: int  # query rows (tokens x heads) of a block
    num_ctas: int
    groups: Tensor | None = None  # [R,3], as `prefix_groups` gives it

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def grouping(self) -> Tensor:
        """The kernel's argument; without groups it is not read."""
        return self.kv_len if self.groups is None else self.groups

    def partials(self) -> int:
        """Enough slots: one for every CTA and one for every block of every strip."""
        shared = 0 if self.groups is None else 1
        blocks = self.num_tokens * self.heads // self.block + self.rows
        return self.num_ctas + blocks * (1 + shared)

    def constants(self) -> dict[str, int]:
        return {"SHARED": int(self.groups is not None), "HEADS": self.heads, "BLOCK": self.block}


def block_rows(num_tokens: int, rows: int, heads: int, sizes: Sequence[int]) -> int:
    """The smallest block that holds an average row's queries, or the largest there is."""
    wanted = -(-num_tokens // max(rows, 1)) * heads
    return next((size for size in sizes if size >= wanted), sizes[-1])


def _check(
    q_latent: Tensor, q_pe: Tensor, cache: Tensor, page_table: Tensor, vectors: Sequence[Tensor]
) -> None:
    def refuse(name: str, value: Tensor, wanted: str) -> None:
        shape = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        raise ValueError(f"attention_mla: {name} is {shape}; gluon takes {wanted}")

    for name, query, width in (("q_latent", q_latent, LATENT), ("q_pe", q_pe, ROPE)):
        if query.dim() != 3 or query.shape[2] != width or query.dtype != torch.bfloat16:
            refuse(name, query, f"[T,H,{width}] bfloat16")
        if query.stride(2) != 1:
            refuse(name, query, "features of unit stride")
    if q_pe.shape[:2] != q_latent.shape[:2]:
        refuse("q_pe", q_pe, f"[{q_latent.shape[0]},{q_latent.shape[1]},{ROPE}], as q_latent")
    wide = {torch.bfloat16: LATENT + ROPE, torch.uint8: ROW_BYTES}.get(cache.dtype)
    if cache.dim() != 3 or cache.shape[2] != wide or cache.shape[1] % TILE:
        refuse("cache", cache, f"[P,n*{TILE},576] bfloat16 or [P,n*{TILE},{ROW_BYTES}] uint8")
    if not cache.is_contiguous() or cache.data_ptr() % 16:
        refuse("cache", cache, "a contiguous cache at a multiple of 16 bytes")
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.stride(1) != 1:
        refuse("page_table", page_table, "[S,P] int32")
    rows = len(vectors[0])
    for name, vector, length in zip(
        ("slots", "q_start", "kv_len"), vectors, (rows, rows + 1, rows), strict=True
    ):
        if vector.shape != (length,) or vector.dtype != torch.int32 or vector.stride(0) != 1:
            refuse(name, vector, f"[{length}] int32")


def _descriptors(cache: Tensor) -> list[TensorDescriptor]:
    """TMA descriptors of the parts of a cached row, a tile of 64 tokens each."""

    def part(view: torch.dtype, dtype: Any, width: int, swizzle: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(
            swizzle_byte_width=swizzle, element_bitwidth=dtype.primitive_bitwidth, rank=2
        )
        flat = cache.view(-1, cache.shape[2]).view(view)
        return TensorDescriptor.from_tensor(flat, [TILE, width], layout)

    if cache.dtype == torch.bfloat16:
        return [part(torch.bfloat16, gl.bfloat16, width, 128) for width in (LATENT, ROPE)]
    return [
        part(torch.int32, gl.int32, 32, 128),
        part(torch.float32, gl.float32, 4, 0),
        part(torch.bfloat16, gl.bfloat16, ROPE, 128),
    ]


def _decode(
    q_latent: Tensor, q_pe: Tensor, cache: Tensor, batch: Batch, scale: float
) -> tuple[Call, Tensor, Tensor]:
    """The kernel over the pages, and its partial results and their sums."""
    float8 = cache.dtype == torch.uint8
    warps, stages = (FLOAT8_BLOCKS if float8 else BFLOAT16_BLOCKS)[batch.block]
    shape = (batch.partials(), batch.block)
    partial = torch.empty(*shape, LATENT, dtype=torch.float32, device=cache.device)
    sums = torch.empty(shape, dtype=torch.float32, device=cache.device)
    tables = (batch.page_table, batch.slots, batch.q_start, batch.kv_len, batch.grouping)
    strides = (*q_latent.stride()[:2], *q_pe.stride()[:2])
    arguments: list[Any] = [*_descriptors(cache), q_latent, q_pe, *tables, partial, sums]
    arguments += [batch.rows, scale * LOG2E, batch.page_table.stride(0), *strides]
    constants = {**batch.constants(), "STAGES": stages, "PAGE": cache.shape[1], "WARPS": warps}
    kernel = mla_decode_fp8 if float8 else mla_decode
    return Call(kernel, (batch.num_ctas,), arguments, constants), partial, sums


def merge_shape(programs: int, num_units: int) -> dict[str, int]:
    """Few query rows are cut into four pieces, so that more of the device merges them."""
    few = programs <= num_units
    width, splits = (LATENT // 4, 128) if few else (LATENT, 16)
    return {"WIDTH": width, "SPLITS": splits, "WARPS": MERGE_WARPS}


def partial_results(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    tables: Sequence[Tensor],
    scale: float,
    groups: Tensor | None = None,
) -> tuple[Batch, Tensor, Tensor]:
    """Launches the kernel over the pages: (batch, partial [slots, block, 512], sums).

    `tables` are page_table, slots, q_start, kv_len. Raises `ValueError` for wrong arguments.
    """
    page_table, slots, q_start, kv_len = tables
    _check(q_latent, q_pe, cache, page_table, (slots, q_start, kv_len))
    num_tokens, heads = q_latent.shape[:2]
    sizes = tuple(FLOAT8_BLOCKS if cache.dtype == torch.uint8 else BFLOAT16_BLOCKS)
    # Queries of a group stand under its shared keys together.
    block = sizes[-1] if groups is not None else block_rows(num_tokens, len(slots), heads, sizes)
    units = num_units(q_latent)
    batch = Batch(page_table, slots, q_start, kv_len, num_tokens, heads, block, units, groups)
    decode, partial, sums = _decode(q_latent, q_pe, cache, batch, scale)
    if num_tokens > 0:
        launch(decode)
    return batch, partial, sums


def attention_mla(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    max_q_len: int = 0,
) -> Tensor:
    """q_latent[T,H,512], q_pe[T,H,64] bf16, pages of 64n tokens -> [T,H,512]; see the reference.

    `max_q_len` is not needed: blocks of query rows are found on the device.
    """
    return _attention(q_latent, q_pe, cache, (page_table, slots, q_start, kv_len), scale, None)


def attention_mla_shared(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    groups: Tensor,
) -> Tensor:
    """As `attention_mla`, groups [R,3] of `prefix_groups` reading their shared pages once."""
    if groups.shape != (len(slots), 3) or groups.dtype != torch.int32 or not groups.is_contiguous():
        raise ValueError(f"attention_mla_shared: groups {tuple(groups.shape)} is not [R,3] int32")
    return _attention(q_latent, q_pe, cache, (page_table, slots, q_start, kv_len), scale, groups)


def prefix_groups(
    page_table: Tensor, slots: Tensor, q_start: Tensor, kv_len: Tensor, page_size: int
) -> Tensor:
    """[R, 3] int32, see the reference; for all layers of a step."""
    if page_size % TILE:
        raise ValueError(f"prefix_groups: page_size {page_size} is no multiple of {TILE}")
    rows = len(slots)
    groups = torch.empty(rows, 3, dtype=torch.int32, device=slots.device)
    if rows > 0:
        common = torch.empty(rows, dtype=torch.int32, device=slots.device)
        arguments: list[Any] = [page_table, slots, q_start, kv_len, common, page_table.stride(0)]
        launch(Call(common_pages, (rows,), arguments, {"PAGE": page_size, "WARPS": 4}))
        constants = {"TILES_A_PAGE": page_size // TILE, "WARPS": 1}
        launch(Call(walk_groups, (1,), [common, groups, rows], constants))
    return groups


def _attention(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    tables: Sequence[Tensor],
    scale: float,
    groups: Tensor | None,
) -> Tensor:
    batch, partial, sums = partial_results(q_latent, q_pe, cache, tables, scale, groups)
    q_start, kv_len = tables[2:]
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    queries = batch.num_tokens * batch.heads
    if queries == 0:
        return out
    shape = merge_shape(queries, batch.num_ctas)
    arguments = [partial, sums, q_start, kv_len, batch.grouping, out, batch.rows, batch.num_ctas]
    grid = (queries * (LATENT // shape["WIDTH"]),)
    launch(Call(mla_combine, grid, arguments, {**batch.constants(), **shape}))
    return out


def check_up(w_uv: Tensor, heads: int) -> None:
    """`ValueError`: not a bfloat16 [H,Dv,512] of these heads."""
    if w_uv.dim() != 3 or w_uv.shape[0] != heads or w_uv.shape[2] != LATENT:
        raise ValueError(f"attention_mla_up: w_uv {tuple(w_uv.shape)} is not [{heads},Dv,{LATENT}]")
    if w_uv.shape[1] % UP_PIECE or w_uv.dtype != torch.bfloat16 or not w_uv.is_contiguous():
        raise ValueError(
            f"attention_mla_up: w_uv [{heads},{w_uv.shape[1]},{LATENT}] {w_uv.dtype}; gluon takes "
            f"contiguous bfloat16 with Dv a multiple of {UP_PIECE}"
        )


def attention_mla_up(
    q_latent: Tensor,
    q_pe: Tensor,
    cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    scale: float,
    w_uv: Tensor,
    max_q_len: int = 0,
) -> Tensor:
    """As `attention_mla`, then w_uv[H,Dv,512] on each head: [T,H,Dv]."""
    num_tokens, heads = q_latent.shape[:2]
    check_up(w_uv, heads)
    tables = (page_table, slots, q_start, kv_len)
    if num_tokens > UP_MAX_TOKENS:  # a matrix product pays for the way to memory and back
        y = attention_mla(q_latent, q_pe, cache, *tables, scale, max_q_len)
        return torch.bmm(y.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    batch, partial, sums = partial_results(q_latent, q_pe, cache, tables, scale)
    value = w_uv.shape[1]
    out = torch.empty(num_tokens, heads, value, dtype=q_latent.dtype, device=q_latent.device)
    if num_tokens == 0:
        return out
    arguments: list[Any] = [partial, sums, q_start, kv_len, batch.grouping, w_uv, out]
    arguments += [batch.rows, batch.num_ctas, num_tokens]
    constants = {"VALUE": value, "PIECE": UP_PIECE, **up_shape()}
    grid = (heads * value // UP_PIECE, min(num_tokens, UP_GROUPS))
    launch(Call(mla_combine_up, grid, arguments, {**batch.constants(), **constants}))
    return out


def up_shape() -> dict[str, int]:
    return {"SPLITS": 16384 // LATENT, "WARPS": MERGE_WARPS}


def requires(ask: Ask) -> str | None:
    """Why these kernels do not take an ask."""
    sizes = ask.shapes
    for name, wanted in (("latent_dim", LATENT), ("rope_dim", ROPE)):
        if sizes.get(name, wanted) != wanted:
            return f"{name} {wanted}, not {sizes[name]}"
    if sizes.get("page_size", TILE) % TILE:
        return f"page_size a multiple of {TILE}, not {sizes['page_size']}"
    if sizes.get("value_dim", UP_PIECE) % UP_PIECE:
        return f"value_dim a multiple of {UP_PIECE}, not {sizes['value_dim']}"
    return None


_OPS: dict[str, Kernel] = {
    "attention_mla": attention_mla,
    "attention_mla_shared": attention_mla_shared,
    "attention_mla_up": attention_mla_up,
    "prefix_groups": prefix_groups,
}
for _op, _kernel in _OPS.items():
    register(
        _op,
        "gluon",
        REGISTRY.documented(_op, _kernel),
        devices=("cuda",),
        dtypes=(torch.bfloat16,),
        archs=(ARCH,),
        requires=requires,
        priority=20,
    )
