# SPDX-License-Identifier: MIT
"""Plan -> tensors -> logits -> ids. Refuses to know when requests begin and end, and any text."""
