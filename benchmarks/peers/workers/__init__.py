# SPDX-License-Identifier: MIT
"""One script an engine, run by that engine's own Python: requests in, the time of each token out."""
