# SPDX-License-Identifier: MIT
"""Compiles every Triton and Gluon kernel for every target without a GPU, and judges the result.

Knows compilers and disassemblers, no kernel: modules of `tokenspeed.kernels` that have a function
`specimens(arch)` say what to compile. Runs in a process of its own, outside of the interpreter:
python -m tests.kernels.aot [--arch ARCH]... [--module NAME] [--only TEXT] [--quick] [--ones]
[--json].
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenspeed.kernels.triton_targets import TARGETS, Specimen


@dataclass(frozen=True)
class Report:
    """What the compiler made of a specimen, and what is wrong with it."""

    name: str
    arch: str
    num_warps: int
    registers: int  # a thread; on AMD the accumulation registers are among them
    shared_bytes: int  # a block
    spill_bytes: int
    matrix: int  # matrix instructions
    seconds: float
    faults: tuple[str, ...]


def kernel_modules() -> Iterator[Any]:
    """Modules that declare specimens."""
    package = importlib.import_module("tokenspeed.kernels")
    for found in pkgutil.iter_modules(package.__path__, "tokenspeed.kernels."):
        if found.name.endswith(("_triton", "_gluon")):
            module = importlib.import_module(found.name)
            if hasattr(module, "specimens"):
                yield module


def specimens(arch: str, module: str | None = None) -> list[Specimen]:
    """Of one module, or of all."""
    modules = kernel_modules() if module is None else [importlib.import_module(module)]
    return [specimen for found in modules for specimen in found.specimens(arch)]


def with_ones(specimen: Specimen) -> Specimen:
    """As a launch with the integer 1 for every argument that Triton then makes a constant."""
    parameters = {p.name: p for p in specimen.kernel.params}
    ones = {
        name: 1
        for name, kind in specimen.signature.items()
        if kind.partition(":")[0] in ("i32", "i64") and not parameters[name].do_not_specialize
    }
    left = {name: kind for name, kind in specimen.signature.items() if name not in ones}
    return replace(
        specimen,
        name=f"{specimen.name}, ones",
        signature=left,
        constants={**specimen.constants, **ones},
        matrix=False,
        must=(),
    )


def compile_specimen(specimen: Specimen, arch: str) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, target = specimen.kernel, TARGETS[arch]
    names = list(kernel.arg_names)
    given = {*specimen.signature, *specimen.constants}
    if given != set(names):
        raise ValueError(f"{specimen.name}: arguments {sorted(given ^ set(names))} do not match")
    types, hints = {}, {}
    for place, name in enumerate(names):
        text, _, divisor = specimen.signature.get(name, "constexpr").partition(":")
        types[name] = text
        if divisor == "16" or text.startswith("*"):
            hints[(place,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, types, constants, hints)
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(
        source,
        target=GPUTarget(target.backend, target.name, target.warp_size),
        options={**options, **specimen.options},
    )


def judge(specimen: Specimen, arch: str) -> Report:
    """Compiles and checks: shared memory, spills, instructions that must and must not appear."""
    start = time.perf_counter()
    try:
        compiled = compile_specimen(specimen, arch)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        fault = f"{type(error).__name__}: {reason[-1][:200]}"
        return Report(specimen.name, arch, specimen.num_warps, 0, 0, 0, 0, 0.0, (fault,))
    seconds = round(time.perf_counter() - start, 2)
    read = _nvidia if TARGETS[arch].backend == "cuda" else _amd
    assembly, registers, spills = read(compiled)
    count = len(re.findall(TARGETS[arch].matrix, assembly))
    shared = int(compiled.metadata.shared)
    limit = TARGETS[arch].max_shared_bytes
    faults = [f"{shared} bytes of shared memory, {limit} allowed"] if shared > limit else []
    if spills:
        faults.append(f"{spills} bytes spilt")
    if specimen.matrix and not count:
        faults.append(f"no {TARGETS[arch].matrix}")
    faults += [f"no {text}" for text in specimen.must if not re.search(text, assembly)]
    faults += [f"{text} appears" for text in specimen.never if re.search(text, assembly)]
    return Report(
        specimen.name,
        arch,
        specimen.num_warps,
        registers,
        shared,
        spills,
        count,
        seconds,
        tuple(faults),
    )


def _nvidia(compiled: Any) -> tuple[str, int, int]:
    """SASS, registers, bytes of local memory (all of it counts as spills: no kernel has arrays)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (_output(tool, flag, file.name) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said: {usage[:200]}")
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return sass, int(found[1]), int(found[2]) + 4 * local


def _amd(compiled: Any) -> tuple[str, int, int]:
    assembly = str(compiled.asm["amdgcn"])
    read = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly)
    }
    return assembly, read["vgpr_count"], 4 * read["vgpr_spill_count"]


def _output(tool: Path, flag: str, file: str) -> str:
    done = subprocess.run([tool, flag, file], capture_output=True, text=True, check=True)
    return done.stdout


def compile_elsewhere(*arguments: str, timeout_s: float = 3000) -> list[dict[str, Any]]:
    """The reports of this program run in a child, where kernels are not interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.aot", "--json", *arguments]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=list(TARGETS))
    parser.add_argument("--module", help="the specimens of this module alone")
    parser.add_argument("--only", default="", help="specimens whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the quick subset")
    parser.add_argument("--ones", action="store_true", help="integer arguments that are 1")
    parser.add_argument("--json", action="store_true", help="a line of JSON each")
    asked = parser.parse_args()
    for arch in asked.arch or TARGETS:
        for specimen in specimens(arch, asked.module):
            if asked.only in specimen.name and (specimen.quick or not asked.quick):
                report = judge(with_ones(specimen) if asked.ones else specimen, arch)
                if asked.ones:  # no launch has strides of 1: what they spill tells nothing
                    errors = tuple(fault for fault in report.faults if "Error" in fault)
                    report = replace(report, faults=errors)
                print(json.dumps(asdict(report)) if asked.json else report, flush=True)


if __name__ == "__main__":
    main()
