# SPDX-License-Identifier: MIT
"""HTTP on one side, `GenerateRequest` on the other. Refuses to know tensors, pages and steps."""
