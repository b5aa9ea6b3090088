# SPDX-License-Identifier: MIT
"""A day of traffic in minutes: the real scheduler against a virtual clock and a model of a device.

Refuses to know tensors, texts and sockets; nothing here reads the machine's clock.
"""
