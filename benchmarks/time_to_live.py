# SPDX-License-Identifier: MIT
"""Hit rate by how long idle keys and values live: recorded sessions, replayed by the simulator.

Beside it stand the published curve of 710 such sessions, and what a cache could reach at best on
those that are replayed (`bench/cache_bound.py`). The device is one on which answers come as fast as
clients saw them, whoever else is served, and has room for everything: only time forgets. No clock
of this machine is read. Needs the recorded sessions (`TOKENSPEED_TRACES`).

    python benchmarks/time_to_live.py [--sessions 60] [--seed 0] [--json FILE]
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from workload_statistics import TABLE_HITS, TTLS_S

from tokenspeed.bench.cache_bound import hit_rates
from tokenspeed.bench.timeline import TYPICAL
from tokenspeed.bench.workloads import traces
from tokenspeed.config import traces_place
from tokenspeed.simulation.device_profile import LinearProfile
from tokenspeed.simulation.options import SimulationOptions
from tokenspeed.simulation.sessions import Session, Workload, condense
from tokenspeed.simulation.simulate import Simulation
from tokenspeed.simulation.tally import Tally

STEP_S = 1 / TYPICAL.tokens_per_s
SEEN = LinearProfile(
    "as clients see it", {"step": STEP_S}, request_s=TYPICAL.first_token_s - STEP_S
)
NEAR = 0.01  # of a rate


def pages_of(session: Session) -> int:
    """So many its prompts and answers need, if no page is ever shared or dropped."""
    turns, size = session.turns, session.block_size
    return sum(len(turn.added) + turn.output_tokens // size + 2 for turn in turns)


def options(workload: Workload, idle_s: float | None) -> SimulationOptions:
    """Room and slots for all at once, and whole prompts in a step."""
    turns = [turn for session in workload.sessions for turn in session.turns]
    longest = max(turn.input_tokens + turn.output_tokens for turn in turns)
    return SimulationOptions(
        num_pages=sum(map(pages_of, workload.sessions)) + longest,
        max_model_len=longest,
        page_size=workload.sessions[0].block_size,
        max_num_seqs=len(workload.sessions),
        max_num_batched_tokens=longest * len(workload.sessions),
        idle_s=idle_s,
    )


def simulated(workload: Workload, ttl_s: float) -> float:
    tally = Tally()
    # Idle is what is between an answer and the next sending. On its way to the engine, and until
    # the step that runs has ended, a turn's prompt is wanted; recorded gaps are whole seconds, and
    # one as long as the time to live is in time.
    play = options(workload, None if math.isinf(ttl_s) else ttl_s + SEEN.request_s + 2 * STEP_S)
    for outcome in Simulation(workload, SEEN, play).outcomes():
        tally.add(outcome)
    return tally.cached_tokens / tally.input_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=60, help="of those recorded")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    args = parser.parse_args()
    whole = traces.make(traces_place(), sessions=args.sessions, seed=args.seed)
    bounds = hit_rates(whole, TTLS_S)
    workload = condense(whole)
    del whole
    print(f"{'idle, s':>8}{'table':>10}{'simulated':>12}{'bound':>10}{'to the bound':>15}")
    rates = []
    for ttl_s, table, bound in zip(TTLS_S, TABLE_HITS, bounds, strict=True):
        rates.append(simulated(workload, ttl_s))
        print(f"{ttl_s:8g}{table:10.3f}{rates[-1]:12.3f}{bound:10.3f}{rates[-1] - bound:+15.4f}")
    near = abs(rates[-1] - bounds[-1]) <= NEAR
    print(f"for ever: within {NEAR:.0%} of a cache without limits: {'yes' if near else 'NO'}")
    found: dict[str, Any] = {"benchmark": "time_to_live", "sessions": args.sessions}
    found |= {"seed": args.seed, "ttls_s": [str(ttl) for ttl in TTLS_S], "table": TABLE_HITS}
    line = json.dumps(found | {"simulated": rates, "bound": bounds})
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
