# SPDX-License-Identifier: MIT
"""The parts of `gpu_kernels.py`: shapes, subjects, peers, timing, tables. Knows no engine."""
