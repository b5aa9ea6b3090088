# SPDX-License-Identifier: MIT
"""What a model needs and gives on devices that need not be here, from its config.json alone.

Builds models on the meta device only: no weight is read or allocated, nothing runs.
"""
