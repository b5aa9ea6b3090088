# SPDX-License-Identifier: MIT
"""What is asked: one file a source, each with a `make` that returns a `Workload`.

Same arguments and seed, same workload. Malformed input is a ValueError that names the file and the
line. Knows no server and no text.
"""
