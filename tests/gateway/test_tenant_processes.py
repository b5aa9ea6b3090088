# SPDX-License-Identifier: MIT
"""A real server with tenants: apart in the real cache, sessions pinned and dropped in the real
engine, a file read again, lines in the log."""

import json
import os
import signal
import time

import httpx

from tests.gateway.processes import server

TENANTS = {
    "tenants": [
        {"name": "first", "keys": ["k1"], "roles": ["inference", "metrics"]},
        {"name": "second", "keys": ["k2"], "requests_per_minute": 6},
    ]
}
BODY = {"prompt": list(range(40, 120)), "max_tokens": 4, "ignore_eos": True}


def test_tenants_sessions_and_their_log(tmp_path):
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps(TENANTS))
    flags = ("--tenants", str(file), "--log-requests", "--page-size", "16")
    with server(*flags, real=True) as s, httpx.Client(base_url=s.url, timeout=60) as http:

        def headers(key):
            return {"x-api-key": key, "session-id": "same"}

        def cached(key):
            reply = http.post("/v1/completions", json=BODY, headers=headers(key))
            assert reply.status_code == 200, reply.text
            return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached(key) for key in ("k1", "k2", "k1", "k2")] == [0, 0, 64, 64]
        reply = http.post("/v1/sessions/same/pin", headers=headers("k1"))
        assert reply.json()["pages"] == 5  # 83 tokens whose keys and values are computed
        (found,) = http.get("/v1/sessions", headers=headers("k1")).json()["data"]
        assert (found["tenant"], found["turns"], found["kv_tokens"]) == ("first", 2, 80)
        assert http.delete("/v1/sessions/same", headers=headers("k1")).json()["pages"] == 5
        assert [cached(key) for key in ("k1", "k2")] == [0, 64]
        assert http.get("/metrics", headers=headers("k2")).status_code == 403

        TENANTS["tenants"][1]["requests_per_minute"] = 1
        file.write_text(json.dumps(TENANTS))
        os.kill(s.process.pid, signal.SIGHUP)
        deadline = time.monotonic() + 20
        while http.post("/v1/completions", json=BODY, headers=headers("k2")).status_code != 429:
            assert time.monotonic() < deadline
        s.process.send_signal(signal.SIGTERM)
        log = s.process.stderr.read().decode()
    lines = [one for one in log.splitlines() if one.startswith("INFO tokenspeed.requests: ")]
    assert sum("tenant=first session=same" in one for one in lines) == 3
    assert "error=rate_limit_exceeded" in lines[-1]
    assert "k1" not in log
    assert "127.0.0.1" not in log
    assert "the tenants were read again" in log
