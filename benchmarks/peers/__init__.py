# SPDX-License-Identifier: MIT
"""The parts of `cpu_peers.py`: set-up, checkpoints, workers, measures, reports.

What stands in `workers/` is run by a peer's own Python and imports nothing of TokenSpeed.
"""
