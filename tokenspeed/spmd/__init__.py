# SPDX-License-Identifier: MIT
"""Where data lives: placements on a mesh, and the compile that checks them once per model.

Refuses to know what a layer computes.
"""
