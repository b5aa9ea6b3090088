# SPDX-License-Identifier: MIT
"""What every backend of an op must answer: inputs, hard ones among them, and stated tolerances.

One module a family; each gives `CASES`, a tuple of `OpCases`. `check` compares a backend with the
float64 reference. Knows no backend by name.
"""

from tokenspeed.kernels.cases.case import Case, Inputs, OpCases, Tolerance, Work
from tokenspeed.kernels.cases.catalog import all_cases, cases_of
from tokenspeed.kernels.cases.check import Report, check

__all__ = [
    "Case",
    "Inputs",
    "OpCases",
    "Report",
    "Tolerance",
    "Work",
    "all_cases",
    "cases_of",
    "check",
]
