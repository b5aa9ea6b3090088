# SPDX-License-Identifier: MIT
"""CUDA sources compiled and judged without a GPU. Knows compilers, no kernel.

nvcc is the one on PATH, a toolkit's in /usr/local/cuda, or that of the extra `cuda-build`.
"""

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel, and its instructions."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    sass: str


def find_nvcc() -> str:
    """The compiler's path. `FileNotFoundError` says how to get one."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [Path("/usr/local/cuda/bin/nvcc"), *sorted(wheels.glob("cu*/bin/nvcc"))]
    found = shutil.which("nvcc") or next((str(p) for p in places if p.is_file()), None)
    if found is None:
        raise FileNotFoundError("no nvcc: pip install -e '.[cuda-build]', or a CUDA toolkit")
    return found


def compile_cubin(source: Path, arch: str, target: Path) -> dict[str, Usage]:
    """Compiles a .cu file for "sm_90a" or the like: its kernels by name. Warnings are errors."""
    virtual = arch.replace("sm_", "compute_")
    command = [find_nvcc(), "-std=c++20", "-O3", "-cubin", f"-gencode=arch={virtual},code={arch}"]
    command += ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [*command, "-o", str(target), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    sass = subprocess.run(
        [cuobjdump(), "-sass", str(target)], capture_output=True, text=True, check=True
    ).stdout
    return {name: _usage(part, sass) for name, part in _parts(done.stderr)}


def _parts(report: str) -> list[tuple[str, str]]:
    pieces = re.split(r"Compiling entry function '(\w+)'", report)
    return list(zip(pieces[1::2], pieces[2::2], strict=True))


def _usage(report: str, sass: str) -> Usage:
    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise RuntimeError(f"ptxas did not say {pattern}: {report}")
        return int(found[1])

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Usage(number(r"Used (\d+) registers"), spills, number(r"(\d+) bytes stack frame"), sass)


def cuobjdump() -> str:
    """The disassembler that Triton carries."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
