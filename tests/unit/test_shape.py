# SPDX-License-Identifier: MIT
"""The shape of the house: who imports whom, and how long files and functions are.

tokenspeed/                   imports go down (`ORDER`); a file says first what it does
tokenspeed/*.py and the .h,   400 lines a file, and half of the files at most 150; 600 where a
.cpp and .cu files of csrc/   folder on the way is called `kernels` or `cpu`
functions in tokenspeed/      60 lines; a device kernel's parameters do not count
tests/, benchmarks/ and       no limit that is checked; a file has one subject, and 400 lines are
examples/                     a reason to look for a second one
"""

import ast
import subprocess
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tokenspeed"
ORDER = (
    "errors config kernels spmd layers models planner execution engine simulation"
    " text llm gateway bench cli"
).split()
# Used from these folders upwards.
COMPILED = {
    "_scheduler": "execution",
    "_policy": "engine",
    "_cpu": "kernels",
    "_shm": "spmd",
    "_drafts": "execution",
}
MAX_FILE, MAX_KERNEL_FILE, MAX_FUNCTION = 400, 600, 60


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The first-level parts of tokenspeed that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenspeed"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tokenspeed.")}
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    me = folder_of(path)
    if me in ("__init__", "__main__"):
        return
    for other in imports_of(path) - {me, "__version__"}:
        lowest_user = COMPILED.get(other, other)
        assert lowest_user in ORDER, f"{path} imports unknown part {other}"
        assert ORDER.index(lowest_user) <= ORDER.index(me), f"{path.name} imports upwards: {other}"


def test_the_benchmark_is_a_client_and_nothing_else() -> None:
    for path in sorted((PACKAGE / "bench").rglob("*.py")):
        assert imports_of(path) <= {"bench", "errors"}, path


def test_no_two_folders_import_each_other() -> None:
    edges = defaultdict(set)
    for path in python_files():
        edges[folder_of(path)] |= imports_of(path) - {folder_of(path)}
    pairs = [(a, b) for a in edges for b in edges[a] if a < b and a in edges.get(b, ())]
    assert pairs == []


def test_file_sizes() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    lengths = {p: len(p.read_text().splitlines()) for p in python_files() + sources}
    for path, length in lengths.items():
        kernel = "kernels" in path.parts or "cpu" in path.parts
        limit = MAX_KERNEL_FILE if kernel else MAX_FILE
        assert length <= limit, f"{path.relative_to(ROOT)} has {length} lines, {limit} allowed"
    written = [n for n in lengths.values() if n > 0]
    assert median(written) <= 150


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # A device kernel takes no object that groups parameters: they do not count.
            names = (ast.unparse(name).partition("(")[0] for name in node.decorator_list)
            jitted = any(name.endswith(".jit") for name in names)
            first = node.body[0].lineno if jitted else node.lineno
            length = (node.end_lineno or 0) - first + 1
            assert length <= MAX_FUNCTION, f"{path.name}:{node.lineno} {node.name}: {length} lines"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_introduce_themselves(path: Path) -> None:
    text = path.read_text()
    if not text.strip():
        return
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert ast.get_docstring(ast.parse(text)), f"{path} says nothing of what it does"


def test_nothing_below_the_gateway_needs_a_server_package() -> None:
    server_only = {"msgspec", "zmq", "starlette", "uvicorn", "prometheus_client", "httptools"}
    allowed = {PACKAGE / "engine" / f"{name}.py" for name in ("wire", "server", "outbox")}
    for path in python_files():
        if folder_of(path) in ("gateway", "cli") or path in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & server_only, f"{path}:{node.lineno}"


def test_only_bindings_include_nanobind() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp") and "bindings" not in path.parts:
            assert "nanobind" not in path.read_text(), path
            assert "torch/" not in path.read_text(), path


def test_import_is_light_and_needs_no_gpu(python: str) -> None:
    code = "import sys, tokenspeed; sys.exit(any(m in sys.modules for m in ('torch', 'zmq')))"
    subprocess.run([python, "-c", code], check=True, cwd=ROOT)
