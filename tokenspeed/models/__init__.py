# SPDX-License-Identifier: MIT
"""One file per architecture, their configuration and their weights. Knows shapes, no requests."""
