# SPDX-License-Identifier: MIT
"""Text to ids and back, and conversations to text. Refuses to know requests, steps and sockets."""
