# SPDX-License-Identifier: MIT
"""Several processes that are one engine: how they meet, how they are started, how they end.

Rank 0 schedules; the others run what it sends. Refuses to know models, requests and kernels.
"""
