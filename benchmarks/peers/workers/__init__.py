# SPDX-License-Identifier: MIT
"""One script an engine, run by its own Python: requests in, the time of each token out."""
