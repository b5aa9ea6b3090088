# SPDX-License-Identifier: MIT
"""schemathesis over the served OpenAPI document: 2,000 cases and more, no unexpected 5xx."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.test_processes import server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
CHECKS += ",response_schema_conformance"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing():
    tool = Path(sys.executable).parent / "schemathesis"
    with server("--step-s", "0.001") as s:
        command = [str(tool), "run", f"{s.url}/openapi.json", "--checks", CHECKS, "--no-color"]
        command += ["-n", "120", "--phases", "coverage,fuzzing", "--seed", "1"]
        command += ["--exclude-path", "/dashboard/events"]  # it has no end
        run = subprocess.run(command, capture_output=True, text=True)
        assert s.ready() == 200
        assert s.gauge("vllm:num_requests_running") == 0
    assert run.returncode == 0, run.stdout
    (generated, passed) = re.findall(r"(\d+) generated, (\d+) passed", run.stdout)[0]
    assert generated == passed
    assert int(generated) >= 2000
