# SPDX-License-Identifier: MIT
"""Modules written for one device, with declared placements. They choose their kernels when built.

Refuses to know which model a layer belongs to and who owns the cache it reads.
"""
