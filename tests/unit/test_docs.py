# SPDX-License-Identifier: MIT
"""What the pages say, against what is there: links, ops, routes, fields and metrics."""

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
