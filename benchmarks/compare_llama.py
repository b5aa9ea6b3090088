# SPDX-License-Identifier: MIT
"""`tokenspeed bench compare` with llama.cpp's server: one dense checkpoint, one agentic workload.

Both serve the same random weights in 8 bits (int8 in groups of 32, Q8_0), with all cores, and hold
all sessions at once; nothing is drafted. Sessions are those of the published shape, divided by
`--scale`, and are sent to both in turns. The first run compiles llama.cpp's server and writes its
file of the checkpoint.

    python benchmarks/compare_llama.py --output FOLDER [--concurrency 1 2 4] [--scale 20]
        [--peers-dir DIR]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_clients.server import running, served
from peers.engines import ENGINES
from peers.setup import Home

MODEL, WEIGHTS = "dense", "int8"
FIRST, GROWTH, TURNS = 50_000, 1_300, 16  # the published shape at its longest, answers included


def context(scale: float) -> int:
    """Tokens of the longest session, and room for what tokenizers differ in."""
    return int((FIRST + GROWTH * TURNS) / scale * 1.1) + 256


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="raw data, table, pictures")
    parser.add_argument("--concurrency", nargs="+", default=["1", "2", "4"])
    parser.add_argument("--sessions-per-stream", default="2")
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--floor", default="5")
    parser.add_argument("--port", type=int, default=8150)
    parser.add_argument("--peers-dir", type=Path, default=Path("~/.cache/tokenspeed/peers"))
    args = parser.parse_args()
    home = Home(args.peers_dir)
    file, binary = home.files(ENGINES["llama.cpp"], MODEL, WEIGHTS), home.llama_server()
    seats, tokens = max(map(int, args.concurrency)), context(args.scale)
    ours = [
        *("tokenspeed", "serve", str(home.model(MODEL)), "--quantization", WEIGHTS),
        *("--max-num-seqs", str(seats), "--max-model-len", str(tokens)),
        *("--num-pages", str(2 * seats * (tokens // 64 + 1))),
        *("--speculative-config", '{"method": "off"}'),
    ]
    theirs = [
        *(str(binary), "--model", str(file), "--port", str(args.port + 1), "--no-webui"),
        *("--parallel", str(seats), "--ctx-size", str(seats * tokens)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        logs, url = Path(folder), f"http://127.0.0.1:{args.port + 1}"
        with (
            served(ours, args.port, logs / "ours.log") as own,
            running(theirs, url, "/health", logs / "theirs.log") as their,
        ):
            compare = [
                *(sys.executable, "-m", "tokenspeed", "bench", "compare"),
                *("--endpoint", f"tokenspeed={own},dialect=completions"),
                *("--endpoint", f"llama-server={their},dialect=completions"),
                *("--workload", "published", "--scale", str(args.scale)),
                *("--sessions-per-stream", args.sessions_per_stream),
                *("--concurrency", *args.concurrency, "--floor", args.floor),
                *("--output", str(args.output)),
            ]
            return subprocess.run(compare, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
