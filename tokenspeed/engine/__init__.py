# SPDX-License-Identifier: MIT
"""Inbox -> plan -> launch -> commit -> outbox. Knows ids; refuses to know text and kernels."""
