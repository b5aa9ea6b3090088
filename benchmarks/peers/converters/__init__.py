# SPDX-License-Identifier: MIT
"""One script a format: Hugging Face folder -> what a peer reads. Run by a peer's Python."""
