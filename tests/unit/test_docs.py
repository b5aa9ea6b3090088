# SPDX-License-Identifier: MIT
"""What the pages say, against what is there: links, ops, routes, fields, metrics, benchmarks."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.gateway.exposition import exposition
from tokenspeed.gateway.metrics import Metrics
from tokenspeed.gateway.openai_completions import CompletionRequest
from tokenspeed.gateway.openai_schema import ChatRequest
from tokenspeed.gateway.routes import route_table
from tokenspeed.kernels.registry import REGISTRY
from tokenspeed.models.registry import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "docs", "benchmarks/results", "examples/demo_model", "tokenspeed/assets/demo")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]


BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(
    path for path in BENCHMARKS.glob("*.py") if '\nif __name__ == "__main__"' in path.read_text()
)


def words(page: str) -> set[str]:
    """Everything between backticks on a page of docs/."""
    text = (ROOT / "docs" / page).read_text()
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_design_lists_every_op() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    REGISTRY.load()
    listed = set(re.findall(r"^\| `(\w+)` \| `\(", text, re.MULTILINE))
    assert listed == set(REGISTRY.ops)


def test_every_route_is_described() -> None:
    service: Any = None  # the table only binds it
    known = " ".join(words("http-api.md"))
    for spec in route_table(service):
        assert spec.path.partition("/{")[0] in known, spec.path


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest])
def test_every_field_is_described(request_type: Any) -> None:
    missing = set(request_type.__struct_fields__) - words("http-api.md")
    assert {name for name in missing if not name.startswith("guided_")} == set()


def test_every_metric_is_described() -> None:
    text = exposition(Metrics("m")).decode()
    names = re.findall(r"^# TYPE (?:vllm:|(tokenspeed:))(\w+)", text, re.MULTILINE)
    assert len(names) > 30
    assert {prefix + name for prefix, name in names} <= words("http-api.md")


def test_every_architecture_has_a_recipe() -> None:
    assert set(ARCHITECTURES) <= words("model-recipes.md")


def benchmark_imports(path: Path) -> set[Path]:
    """The files of benchmarks/ that a file there imports, directly or not, and itself."""
    found, left = set(), [path]
    while left:
        one = left.pop()
        found.add(one)
        for node in ast.walk(ast.parse(one.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.removeprefix("benchmarks.").split(".")
                file = BENCHMARKS.joinpath(*parts).with_suffix(".py")
                if file.is_file() and file not in found:
                    left.append(file)
    return found


def has_option(script: Path, flag: str) -> bool:
    """Whether the code says so: what a docstring promises does not count."""
    code = "\n".join(path.read_text() for path in benchmark_imports(script))
    by_name = 'f"--{name}"' in code and f'"{flag[2:]}"' in code
    return f'"{flag}"' in code or by_name


def benchmark_commands(text: str) -> list[tuple[str, list[str]]]:
    """Scripts of benchmarks/ that a page runs, in blocks and between backticks, and their flags."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\n[ \t]+", " ", block).splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        run = re.match(r"\S*python (?:-m benchmarks\.(\w+)|benchmarks/(\w+)\.py)(.*)", line)
        if run is not None:
            flags = re.findall(r"(?<=[\s\[])--[a-z][\w-]*", run[3].partition(" # ")[0])
            found.append((run[1] or run[2], flags))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_benchmark_is_described(script: Path) -> None:
    named = rf"\b{script.stem}\.py\b|-m benchmarks\.{script.stem}\b"
    assert re.search(named, (ROOT / "docs" / "benchmarks.md").read_text())


def test_pages_run_benchmarks_with_options_that_there_are() -> None:
    commands = benchmark_commands((ROOT / "docs" / "benchmarks.md").read_text())
    assert {script.stem for script in SCRIPTS} - {name for name, _ in commands} == {"null_engine"}
    assert sum(len(flags) for _, flags in commands) > 100
    for page in sorted((ROOT / "docs").glob("*.md")):
        commands += benchmark_commands(page.read_text())
    for name, flags in commands:
        script = BENCHMARKS / f"{name}.py"
        assert script in SCRIPTS, name
        assert [flag for flag in flags if not has_option(script, flag)] == [], name


def test_make_bench_runs_what_the_page_says() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    runs = {a or b for a, b in re.findall(r"benchmarks/(\w+)\.py|-m benchmarks\.(\w+)", recipe)}
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    said = page.partition("`make bench` runs ")[2].partition("The others")[0]
    assert runs == set(re.findall(r"`(\w+)\.py`", said))
