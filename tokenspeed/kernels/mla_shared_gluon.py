# SPDX-License-Identifier: MIT
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Groups of rows that share leading pages, found on the device. Knows page ids, no attention.

Two small kernels once a step: every row compares its pages with those of the row before it, then
one warp walks over the rows. See `mla_shared.py` for what a group is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.mla_decode_gluon import barrier

MIN_TILES = gl.constexpr(8)
PAGES = gl.constexpr(512)  # compared at once
COMPARE_WARPS = gl.constexpr(4)


@gluon.jit
def _full_pages(q_start, kv_len, row, PAGE: gl.constexpr):
    """Pages before a row's first query; 0 for a row without queries."""
    queries = gl.load(q_start + row + 1) - gl.load(q_start + row)
    return gl.where(queries > 0, (gl.load(kv_len + row) - queries) // PAGE, 0)


@gluon.jit(do_not_specialize=["table_stride"])
def common_pages(
    page_table, slots, q_start, kv_len, common, table_stride,
    PAGE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """common[r]: leading pages that rows r - 1 and r both have; grid (R)."""
    gdc_wait()
    row = gl.program_id(0)
    count = 0
    if row > 0:
        above = _full_pages(q_start, kv_len, row - 1, PAGE)
        count = gl.minimum(above, _full_pages(q_start, kv_len, row, PAGE))
        layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        mine = page_table + gl.load(slots + row).to(gl.int64) * table_stride
        theirs = page_table + gl.load(slots + (row - 1)).to(gl.int64) * table_stride
        first = 0
        while first < count:
            at = first + gl.arange(0, PAGES, layout)
            inside = at < count
            a = gl.load(mine + at, mask=inside, other=0)
            b = gl.load(theirs + at, mask=inside, other=0)
            count = gl.minimum(count, gl.min(gl.where(a == b, count, at), 0))
            first += PAGES
    gl.store(common + row, count)
    gdc_launch_dependents()


@gluon.jit(do_not_specialize=["rows"])
def walk_groups(common, groups, rows, TILES_A_PAGE: gl.constexpr, WARPS: gl.constexpr):
    """groups[R,3] from common[R]; one program of one warp: forth for leaders, back for ends."""
    gdc_wait()
    leader, shared = 0, 0
    for row in range(rows):
        tiles = gl.load(common + row) * TILES_A_PAGE
        alone = (tiles < MIN_TILES) | (2 * tiles < shared)
        leader = gl.where(alone, row, leader)
        joined = gl.where(shared > 0, gl.minimum(shared, tiles), tiles)
        shared = gl.where(alone, 0, joined)
        gl.store(groups + row * 3, leader)
        gl.store(groups + row * 3 + 2, shared)
    barrier()
    end, shared, below = rows, 0, rows
    for back in range(rows):
        row = rows - 1 - back
        leader = gl.load(groups + row * 3)
        last = leader != below
        end = gl.where(last, row + 1, end)
        shared = gl.where(last, gl.load(groups + row * 3 + 2), shared)
        below = leader
        barrier()
        gl.store(groups + row * 3 + 1, end)
        gl.store(groups + row * 3 + 2, shared)
    gdc_launch_dependents()
