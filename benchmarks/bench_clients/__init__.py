# SPDX-License-Identifier: MIT
"""Other projects' benchmark clients: how each is asked for a load, and what it says of it."""
