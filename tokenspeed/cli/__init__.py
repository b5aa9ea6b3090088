# SPDX-License-Identifier: MIT
"""The `tokenspeed` command, one file a subcommand. Refuses to know HTTP, tensors and sampling."""
