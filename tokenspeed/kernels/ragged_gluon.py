# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-call"
"""`attention_ragged` on Hopper for heads of 128 + 64 features: checks and the launch.

The kernel is `ragged_attend_gluon.py`. Refuses other head sizes; Triton's kernel takes those.
"""

from collections.abc import Iterator

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tokenspeed.kernels import mla_gluon
from tokenspeed.kernels.mla_gluon import ARCH, LOG2E, Call
from tokenspeed.kernels.ragged_attend_gluon import ragged_attend
from tokenspeed.kernels.registry import REGISTRY, Ask, register
from tokenspeed.kernels.triton_targets import Specimen

HEAD, TAIL = 128, 64
QUERIES, KEYS = 64, 64  # rows of a descriptor's box
_SIZES = {"head_dim": HEAD + TAIL, "value_dim": HEAD, "tail_dim": TAIL}


def _layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _descriptor(name: str, x: Tensor, width: int, rows: int) -> TensorDescriptor:
    """x[N, H, width] as a matrix [N, columns] in which head h begins at h * x.stride(1)."""
    if x.shape[2] != width or x.dtype != torch.bfloat16:
        wanted = f"[N,H,{width}] bfloat16"
        raise ValueError(f"attention_ragged: {name} {tuple(x.shape)}; gluon takes {wanted}")
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
        wanted = "features of unit stride, tokens and heads at multiples of 16 bytes"
        raise ValueError(f"attention_ragged: {name} strides {x.stride()}; gluon takes {wanted}")
    columns = (x.shape[1] - 1) * x.stride(1) + width
    matrix = x.as_strided((x.shape[0], columns), (x.stride(0), 1))
    return TensorDescriptor.from_tensor(matrix, [rows, width], _layout())


def attention_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: Tensor,
    k_start: Tensor,
    scale: float,
    causal: bool = True,
    q_tail: Tensor | None = None,
    k_tail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, v and k of 128 features, tails of 64, as many heads of keys as of queries."""
    if q_tail is None or k_tail is None:
        raise ValueError("attention_ragged: gluon takes q_tail and k_tail")
    num_tokens, heads = q.shape[:2]
    if k.shape[1] != heads or v.shape[1] != heads:
        raise ValueError(f"attention_ragged: gluon takes {heads} heads of k, not {k.shape[1]}")
    out = torch.empty(num_tokens, heads, HEAD, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_tokens, heads, dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    if len(k) == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    shaped = (
        _descriptor("q", q, HEAD, QUERIES),
        _descriptor("q_tail", q_tail, TAIL, QUERIES),
        _descriptor("k", k, HEAD, KEYS),
        _descriptor("k_tail", k_tail.unsqueeze(1), TAIL, KEYS),
        _descriptor("v", v, HEAD, KEYS),
    )
    rows = len(q_start) - 1
    strides = (q.stride(1), q_tail.stride(1), k.stride(1), v.stride(1))
    arguments = (*shaped, q_start, k_start, out, lse, rows, heads, scale * LOG2E, *strides)
    grid = (num_tokens // (2 * QUERIES) + rows, heads)
    mla_gluon.launch(Call(ragged_attend, grid, arguments, {"CAUSAL": causal, "WARPS": 4}))
    return out, lse


def _requires(ask: Ask) -> str | None:
    for name, wanted in _SIZES.items():
        if ask.shapes.get(name, 0) != wanted:
            return f"{name} {wanted}, not {ask.shapes.get(name, 0)}"
    heads = ask.shapes.get("num_heads"), ask.shapes.get("num_kv_heads")
    return None if heads[0] == heads[1] else f"as many heads of keys as of queries, not {heads}"


def specimens(arch: str) -> Iterator[Specimen]:
    """Causal, as a prompt attends to itself, and not, as it attends to a cached prefix."""
    if arch != ARCH:
        return

    def descriptor(rows: int, width: int) -> str:
        return f"tensordesc<bf16[{rows}, {width}],{_layout()!r}>"

    signature = {"q_head": descriptor(QUERIES, HEAD), "q_tail": descriptor(QUERIES, TAIL)}
    signature |= {"k_head": descriptor(KEYS, HEAD), "k_tail": descriptor(KEYS, TAIL)}
    signature |= {"values": descriptor(KEYS, HEAD), "q_start": "*i32", "k_start": "*i32"}
    signature |= {"out": "*bf16", "lse": "*fp32", "rows": "i32", "heads": "i32", "scale": "fp32"}
    strides = ("q_stride", "q_tail_stride", "k_stride", "v_stride")
    signature |= dict.fromkeys(strides, "i32:16")
    for causal in (True, False):
        yield Specimen(
            f"ragged_attend{' causal' if causal else ''}",
            ragged_attend,
            signature,
            {"CAUSAL": causal, "WARPS": 4},
            num_warps=4,
            options={"launch_pdl": True},
            matrix=True,
            must=("UTMALDG", "USETMAXREG", "ACQBULK", "PREEXIT"),
            never=(r"\bHMMA",),
        )


register(
    "attention_ragged",
    "gluon",
    REGISTRY.documented("attention_ragged", attention_ragged),
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
    archs=(ARCH,),
    requires=_requires,
    priority=20,
)
