# SPDX-License-Identifier: MIT
"""An estimate as tables for people and as plain values for programs. Computes nothing new."""

from collections.abc import Iterator
from typing import Any

from tokenspeed.planner.compiled_table import compiled_table
from tokenspeed.planner.devices import GIB
from tokenspeed.planner.estimate import Estimate
from tokenspeed.planner.search import Found
from tokenspeed.planner.table import Table

RUNNERS_UP = 8


def summary(found: Estimate) -> str:
    """One line: what is planned on what."""
    planned, mesh = found.workload.planned, found.mesh
    return (
        f"{planned.name}: {planned.num_parameters / 1e9:.1f}B parameters on "
        f"{mesh.num_ranks} x {found.device.name}, mesh {mesh}"
    )


def tables(found: Estimate, price_per_hour: float | None) -> Iterator[Table]:
    """Everything about one mesh."""
    yield compiled_table(found)
    yield Table("Memory of the fullest rank", ("", "GiB"), list(_memory_rows(found)))
    yield Table("What fits", ("", "tokens"), list(_capacity_rows(found)))
    yield _time_table(found)
    yield Table("Service", ("", ""), list(_service_rows(found, price_per_hour)))


def _memory_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    room, workload = found.room, found.workload
    fullest = max(range(found.mesh.pp), key=workload.weight_bytes)
    sizes: dict[str, float] = {}
    for entry in workload.entries:
        held = entry.counts[fullest] * entry.op.weight_bytes
        sizes[entry.op.format.name] = sizes.get(entry.op.format.name, 0.0) + held
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size:
            yield f"weights in {name}", _gib(size)
    yield "rotary tables", _gib(room.table_bytes)
    yield "activations of one step", _gib(room.activation_bytes)
    yield "runtime, graphs, buffers (estimate)", _gib(room.runtime_bytes)
    yield "left for keys and values", _gib(room.kv_bytes)
    yield "of", _gib(room.device_bytes)


def _capacity_rows(found: Estimate) -> Iterator[tuple[str, str]]:
    room, load = found.room, found.load
    yield "keys and values of a token on a rank, bytes", f"{room.kv_bytes_per_token:,.0f}"
    yield "tokens of context on all ranks together", f"{room.kv_tokens:,}"
    yield "longest context of one request", f"{room.max_context:,}"
    yield f"requests of {load.context:,} tokens at once", f"{room.concurrency(load.context):,}"


def _time_table(found: Estimate) -> Table:
    stages = found.decode
    rows = []
    for name in stages[0].parts:
        rows.append((name, *(f"{1e3 * time.parts[name]:.3f}" for time in stages)))
    rows.append(("total", *(f"{1e3 * time.total_s:.3f}" for time in stages)))
    header = ("ms", *([f"stage {i}" for i in range(len(stages))] if len(stages) > 1 else ["step"]))
    load = found.load
    return Table(
        f"A decode step: {load.batch} requests of {load.context:,} tokens"
        + (f", in {found.micro_steps} micro-steps" if found.micro_steps > 1 else ""),
        header,
        rows,
    )


def _service_rows(found: Estimate, price: float | None) -> Iterator[tuple[str, str]]:
    load = found.load
    yield "TPS per user", f"{found.tps_per_user:.1f}"
    yield "output tokens per minute and device", f"{found.tokens_per_minute_per_device:,.0f}"
    cached = load.context - found.computed_tokens
    yield (
        f"prefill of {found.computed_tokens:,} after {cached:,} cached, s",
        f"{found.prefill_s:.3f}",
    )
    per_device = 60 * found.prefill_tokens_per_s / found.mesh.num_ranks
    yield "computed prompt tokens per minute and device", f"{per_device:,.0f}"
    if price is not None:
        for name, cost in found.cost(price).items():
            yield f"price of 1M tokens, {name}", f"{cost:.4f}"


def search_table(found: Found) -> Table:
    """The best meshes, then those below the floor."""
    rows = [_candidate(each, "") for each in found.ranked[:RUNNERS_UP]]
    rows += [_candidate(each, "below the floor") for each in found.slow[: RUNNERS_UP - len(rows)]]
    header = (
        "mesh",
        "batch",
        "TPS/user",
        "tokens/min/device",
        "weights GiB",
        "KV tokens",
        "prefill s",
        "",
    )
    return Table(f"{len(found.ranked)} meshes above the floor, best first", header, rows)


def _candidate(each: Estimate, note: str) -> tuple[str, ...]:
    return (
        str(each.mesh),
        str(each.load.batch),
        f"{each.tps_per_user:.1f}",
        f"{each.tokens_per_minute_per_device:,.0f}",
        _gib(each.room.weight_bytes),
        f"{each.room.kv_tokens:,}",
        f"{each.prefill_s:.2f}",
        note,
    )


def refused_table(found: Found) -> Table:
    """How many meshes were refused, and why."""
    rows = [(reason, str(count)) for reason, count in found.refused.most_common()]
    return Table("Meshes refused", ("reason", "meshes"), rows)


def assumptions(found: Estimate) -> list[str]:
    """What the figures take for granted."""
    device, load = found.device, found.load
    return [
        f"{device.name}: {device.source}; reached {device.bandwidth_share:.0%} of the bandwidth, "
        f"{device.compute_share:.0%} of the peak, {device.link_share:.0%} of the links; "
        f"{1e6 * device.link_latency_s:.0f} us an exchange, {1e6 * device.launch_s:.1f} us a "
        "kernel (estimates)",
        "tokens choose experts evenly, nothing overlaps, no speculation; latent attention absorbed",
        f"steps of at most {load.step_tokens} tokens on a dp rank, pages of {load.page_size}",
        _weights_note(found),
    ]


def _weights_note(found: Estimate) -> str:
    names = {entry.op.format.name for entry in found.workload.entries}
    if names <= {"fp32", "bf16"}:
        return "weights as the checkpoint stores them unless --weight-dtype says otherwise"
    return (
        "weights as stored or asked for; this release decodes fp8 to bf16 when it loads, and loads "
        "no four-bit weights (--weight-dtype bf16 plans for what it holds)"
    )


def values(found: Estimate, price: float | None, *, compiled: bool = True) -> dict[str, Any]:
    """Everything for programs: bytes, seconds, tokens. `compiled` False leaves the table out."""
    room, mesh, planned = found.room, found.mesh, found.workload.planned
    table = compiled_table(found)
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    return {
        "model": planned.name,
        "parameters": planned.num_parameters,
        "device": found.device.name,
        "mesh": {axis: getattr(mesh, axis) for axis in ("tp", "ep", "dp", "pp")},
        "ranks": mesh.num_ranks,
        "batch": found.load.batch,
        "context": found.load.context,
        "computed_tokens": found.computed_tokens,
        "weight_bytes_per_rank": room.weight_bytes,
        "table_bytes": room.table_bytes,
        "activation_bytes": room.activation_bytes,
        "runtime_bytes": room.runtime_bytes,
        "kv_bytes_per_rank": room.kv_bytes,
        "kv_bytes_per_token_per_rank": room.kv_bytes_per_token,
        "kv_tokens": room.kv_tokens,
        "max_context": room.max_context,
        "concurrency": room.concurrency(found.load.context),
        "decode_s": [time.parts for time in found.decode],
        "token_s": found.token_s,
        "tps_per_user": found.tps_per_user,
        "output_tokens_per_minute_per_device": found.tokens_per_minute_per_device,
        "prefill_s": found.prefill_s,
        "prefill_tokens_per_s": found.prefill_tokens_per_s,
        "price_per_million_tokens": None if price is None else found.cost(price),
    } | ({"compiled": rows, "assumptions": assumptions(found)} if compiled else {})


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
