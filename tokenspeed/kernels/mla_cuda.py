# SPDX-License-Identifier: MIT
"""`attention_mla_up` with its merge in CUDA (csrc/cuda/mla_combine.cu): clusters share their parts.

The pages are read by the Gluon kernel. Knows the bytes that the kernel takes, not what it does.
"""

import struct

import torch
from torch import Tensor

from tokenspeed.kernels import cuda_driver, mla_gluon
from tokenspeed.kernels.registry import REGISTRY, Ask, register

NAME, ARCH = "mla_combine", "sm_90a"
CLUSTER, THREADS, VALUE = 4, 256, 128
SHARED_BYTES = 2 * 512 * 4 + 8 * 128 * 4 + 8 * 4  # struct Shared
PARAMS = "<6Q5i4x"  # MlaCombineUpParams of csrc/cuda/mla_combine.h


def pack_params(tensors: tuple[Tensor, ...], batch: mla_gluon.Batch) -> bytes:
    """The kernel's argument: partial, sums, q_start, kv_len, w_uv, out, and the batch's sizes."""
    sizes = (batch.rows, batch.num_ctas, batch.num_tokens, batch.heads, batch.block)
    return struct.pack(PARAMS, *(x.data_ptr() for x in tensors), *sizes)


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
    """As `attention_mla`, then w_uv[H,128,512] on each head: [T,H,128]."""
    tables = (page_table, slots, q_start, kv_len)
    num_tokens, heads = q_latent.shape[:2]
    if num_tokens > mla_gluon.UP_MAX_TOKENS or w_uv.shape[1] != VALUE:
        return mla_gluon.attention_mla_up(q_latent, q_pe, cache, *tables, scale, w_uv, max_q_len)
    mla_gluon.check_up(w_uv, heads)
    batch, partial, sums = mla_gluon.partial_results(q_latent, q_pe, cache, tables, scale)
    out = torch.empty(num_tokens, heads, VALUE, dtype=q_latent.dtype, device=q_latent.device)
    if num_tokens > 0:
        params = pack_params((partial, sums, q_start, kv_len, w_uv, out), batch)
        grid = (CLUSTER * heads, min(num_tokens, mla_gluon.UP_GROUPS))
        cuda_driver.launch(NAME, ARCH, "mla_combine_up", grid, THREADS, SHARED_BYTES, params)
    return out


def _requires(ask: Ask) -> str | None:
    if ask.shapes.get("value_dim", VALUE) != VALUE:
        return f"value_dim {VALUE}, not {ask.shapes['value_dim']}"
    return cuda_driver.missing(NAME, ARCH) or mla_gluon.requires(ask)


register(
    "attention_mla_up",
    "cuda",
    REGISTRY.documented("attention_mla_up", attention_mla_up),
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
    archs=("sm_90",),
    requires=_requires,
    priority=30,
)
