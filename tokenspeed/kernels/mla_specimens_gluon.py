# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-call"
"""The compiled forms of the latent-attention kernels on Hopper, to be judged without the device.

Knows signatures and launch shapes (`mla_gluon.py`), nothing that runs.
"""

from collections.abc import Iterator
from typing import Any

import triton.experimental.gluon.language as gl

from tokenspeed.kernels.mla_combine_gluon import mla_combine, mla_combine_up
from tokenspeed.kernels.mla_decode_fp8_gluon import mla_decode_fp8
from tokenspeed.kernels.mla_decode_gluon import mla_decode
from tokenspeed.kernels.mla_gluon import (
    ARCH,
    BFLOAT16_BLOCKS,
    FLOAT8_BLOCKS,
    LATENT,
    MERGE_WARPS,
    ROPE,
    TILE,
    UP_PIECE,
    merge_shape,
    up_shape,
)
from tokenspeed.kernels.mla_shared_gluon import common_pages, walk_groups
from tokenspeed.kernels.triton_targets import Specimen


def _descriptor_type(name: str, width: int, bits: int, swizzle: int) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)
    return f"tensordesc<{name}[{TILE}, {width}],{layout!r}>"


def specimens(arch: str) -> Iterator[Specimen]:
    """Blocks of 16 to 64 query rows over both kinds of pages, and the merges."""
    if arch != ARCH:
        return
    tables = dict.fromkeys(("page_table", "slots", "q_start", "kv_len", "groups"), "*i32")
    common = {"q_latent": "*bf16", "q_pe": "*bf16", **tables, "out": "*fp32", "lse": "*fp32"}
    common |= {"rows": "i32", "scale": "fp32", "table_stride": "i32"}
    common |= dict.fromkeys(("q_token", "q_head", "pe_token", "pe_head"), "i32:16")
    rope = {"ropes": _descriptor_type("bf16", ROPE, 16, 128)}
    bfloat16 = {"latents": _descriptor_type("bf16", LATENT, 16, 128), **rope}
    codes = _descriptor_type("i32", 32, 32, 128)
    float8 = {"codes": codes, "scales": _descriptor_type("fp32", 4, 32, 0), **rope}
    must = ("UTMALDG", "USETMAXREG", "ACQBULK", "PREEXIT")
    for kernel, parts, sizes in (
        (mla_decode, bfloat16, BFLOAT16_BLOCKS),
        (mla_decode_fp8, float8, FLOAT8_BLOCKS),
    ):
        for block, (warps, stages) in sizes.items():
            yield Specimen(
                f"{kernel.__name__} {block} rows",
                kernel,
                {**parts, **common},
                {
                    "SHARED": 0,
                    "HEADS": 16,
                    "BLOCK": block,
                    "STAGES": stages,
                    "PAGE": TILE,
                    "WARPS": warps,
                },
                num_warps=warps,
                options={"launch_pdl": True},
                matrix=True,
                must=must,
                never=(r"\bHMMA",),
                quick=kernel is mla_decode and block == 16,
            )
    yield _shared_specimen(mla_decode, {**bfloat16, **common}, 64, must)
    yield _shared_specimen(mla_decode_fp8, {**float8, **common}, 32, must)
    yield from _merge_specimens()
    yield from _group_specimens()


def _shared_specimen(
    kernel: Any, signature: dict[str, str], block: int, must: tuple[str, ...]
) -> Specimen:
    warps, stages = (BFLOAT16_BLOCKS if kernel is mla_decode else FLOAT8_BLOCKS)[block]
    sizes = {"HEADS": 16, "BLOCK": block, "STAGES": stages, "PAGE": TILE, "WARPS": warps}
    return Specimen(
        f"{kernel.__name__} {block} rows, shared pages",
        kernel,
        signature,
        {"SHARED": 1, **sizes},
        num_warps=warps,
        options={"launch_pdl": True},
        matrix=True,
        must=must,
        never=(r"\bHMMA",),
    )


def _group_specimens() -> Iterator[Specimen]:
    tables = dict.fromkeys(("page_table", "slots", "q_start", "kv_len", "common"), "*i32")
    options = {"launch_pdl": True}
    yield Specimen(
        "common_pages",
        common_pages,
        {**tables, "table_stride": "i32"},
        {"PAGE": TILE, "WARPS": 4},
        num_warps=4,
        options=options,
    )
    yield Specimen(
        "walk_groups",
        walk_groups,
        {"common": "*i32", "groups": "*i32", "rows": "i32"},
        {"TILES_A_PAGE": 1, "WARPS": 1},
        num_warps=1,
        options=options,
    )


def _merge_specimens() -> Iterator[Specimen]:
    signature = {"partial": "*fp32", "sums": "*fp32"}
    signature |= dict.fromkeys(("q_start", "kv_len", "groups"), "*i32")
    tail = {"out": "*bf16", "rows": "i32", "num_ctas": "i32"}
    options = {"launch_pdl": True}
    for programs in (16, 1024):
        shape = merge_shape(programs, 132)
        yield Specimen(
            f"mla_combine {shape['WIDTH']} features",
            mla_combine,
            {**signature, **tail},
            {"SHARED": 0, "HEADS": 16, "BLOCK": 16, **shape},
            num_warps=shape["WARPS"],
            options=options,
            must=(r"LDG\S*\.128",),
        )
    yield Specimen(
        "mla_combine_up",
        mla_combine_up,
        {**signature, "w_uv": "*bf16", **tail, "num_tokens": "i32"},
        {"SHARED": 0, "HEADS": 16, "BLOCK": 16, "VALUE": 128, "PIECE": UP_PIECE, **up_shape()},
        num_warps=MERGE_WARPS,
        options=options,
        must=(r"LDG\S*\.128",),
    )
