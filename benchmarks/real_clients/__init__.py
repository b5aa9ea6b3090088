# SPDX-License-Identifier: MIT
"""Parts of `benchmarks/clients.py`: real clients, their tasks, their servers, what they send."""
