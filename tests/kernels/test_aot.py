# SPDX-License-Identifier: MIT
"""Kernels compiled for devices that are not here: shared memory, spills, matrix instructions."""

import pytest

from tests.kernels.aot import compile_elsewhere
from tokenspeed.kernels.triton_targets import TARGETS

pytest.importorskip("triton")


def test_the_quick_subset_compiles_for_both_makers() -> None:
    reports = compile_elsewhere("--quick", "--arch", "sm_90", "--arch", "gfx950")
    assert {report["arch"] for report in reports} == {"sm_90", "gfx950"}
    assert {report["name"]: report["faults"] for report in reports if report["faults"]} == {}


@pytest.mark.full
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_compiles(arch: str) -> None:
    reports = compile_elsewhere("--arch", arch)
    assert len(reports) > 0
    assert {report["name"]: report["faults"] for report in reports if report["faults"]} == {}


@pytest.mark.full
def test_every_kernel_compiles_for_launches_of_one() -> None:
    """Triton makes a constant of an integer that is 1: a batch of one token must compile too."""
    reports = compile_elsewhere("--ones", "--arch", "sm_90", "--arch", "gfx950")
    assert {report["name"]: report["faults"] for report in reports if report["faults"]} == {}


def test_faults_are_found() -> None:
    """A kernel that spills, takes too much shared memory and has no matrix instruction."""
    reports = compile_elsewhere("--module", "tests.kernels.faulty_kernel", "--arch", "sm_120")
    faults = {report["name"]: " ".join(report["faults"]) for report in reports}
    assert "bytes spilt" in faults["spills"]
    assert "101376 allowed" in faults["too much shared memory"]
    assert faults["no matrix product"] == "no HMMA no MUFU.SIN LDG appears"
    assert "do not match" in faults["a misspelt argument"]
    assert faults["nothing wrong"] == ""
