# SPDX-License-Identifier: MIT
"""An engine whose keys and values are int8: close to the one whose are not, and smaller."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.paged_run import PagedRun
from tokenspeed.config import EngineConfig
from tokenspeed.engine.part import CACHE_DTYPES, build_part
from tokenspeed.models.build import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_logits_stay_close_and_pages_are_smaller(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, "qwen3"), torch.float32, torch.device("cpu"), 192)
    specs, plain = model.cache_specs(CACHE_DTYPES["int8"]), model.cache_specs()
    head = plain[0].shapes[0][-1]
    assert specs[0].bytes_per_token() * 4 * head == plain[0].bytes_per_token() * (head + 4)
    ids = list(range(3, 90))
    exact, held = PagedRun(model), PagedRun(model)
    held.caches = [
        tuple(torch.full((64, 16, *s), 255, dtype=spec.dtype) for s in spec.shapes)
        for spec in specs
    ]
    for piece in (ids[:60], ids[60:86], ids[86:]):
        expected, found = exact.step({1: piece}), held.step({1: piece})
        assert not torch.equal(found, expected)
        assert (found - expected).std() < 0.03 * expected.std()


def test_the_engine_keeps_bytes(tmp_path: Path) -> None:
    config = EngineConfig.of(kv_cache_dtype="int8", num_pages=8, max_model_len=128)
    part = build_part(config, make_checkpoint(tmp_path, "qwen3"))
    assert all(t.dtype == torch.uint8 for layer in part.runner.cache.layers for t in layer)


def test_latents_are_refused(tmp_path: Path) -> None:
    config = EngineConfig.of(kv_cache_dtype="int8", num_pages=8, max_model_len=128)
    with pytest.raises(ValueError, match="kv_cache_dtype int8"):
        build_part(config, make_checkpoint(tmp_path, "deepseek_v3"))
