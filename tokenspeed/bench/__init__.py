# SPDX-License-Identifier: MIT
"""Workloads, a load generator, measures and plots: a client of the HTTP API.

Knows nothing of the engine, the scheduler or any tokenizer: it could be pointed at any server.
"""
