# SPDX-License-Identifier: MIT
# mypy: disable-error-code="import-not-found"
"""Hugging Face folder -> OpenVINO IR with 16-bit or 8-bit weights, through optimum-intel.

    to_openvino.py MODEL_FOLDER OUT_FOLDER bf16|int8|int4

DeepSeek V3 is traced as transformers has it, since optimum's own patch is for older sources, but
with experts as one batched product: the form that OpenVINO turns into its kernel for routed ones.
"""

import sys
from pathlib import Path
from typing import Any

import nncf
import openvino
import torch
from optimum.exporters.openvino import main_export, model_configs
from optimum.exporters.openvino.model_patcher import OVDecoderModelPatcher
from optimum.intel import OVConfig

QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},  # per output channel, its default
    "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32, "all_layers": True},
}


def batched_experts(
    self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, [E, T, D], weighted by the routing: zero where not routed."""
    stacks = (self.stacked_gate, self.stacked_up, self.stacked_down)
    gate, up, down = (stack.to(hidden.dtype).transpose(1, 2) for stack in stacks)
    num_experts, num_tokens = len(self.experts), hidden.shape[0]
    routing = torch.zeros(num_tokens, num_experts, dtype=hidden.dtype)
    routing = routing.scatter(1, ids, weights.to(hidden.dtype))
    repeated = hidden.repeat(num_experts, 1).view(num_experts, -1, hidden.shape[-1])
    inner = torch.nn.functional.silu(torch.bmm(repeated, gate)) * torch.bmm(repeated, up)
    outputs = torch.bmm(inner, down).view(num_experts, num_tokens, -1)
    spread = routing.transpose(0, 1).reshape(num_experts, num_tokens).unsqueeze(-1)
    return (outputs * spread).sum(0)


class TracedDeepseek(OVDecoderModelPatcher):  # type: ignore[misc]
    """The model's own attention, and experts as above."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        for layer in self._model.model.layers:
            if hasattr(layer.mlp, "experts"):
                for name in ("gate", "up", "down"):
                    parts = [getattr(e, f"{name}_proj").weight for e in layer.mlp.experts]
                    layer.mlp.register_buffer(f"stacked_{name}", torch.stack(parts))
                layer.mlp.moe = batched_experts.__get__(layer.mlp)
        return found


def main(model: str, out: str, weights: str) -> None:
    deepseek = model_configs.DeepseekOpenVINOConfig
    deepseek._MODEL_PATCHER, deepseek.MAX_TRANSFORMERS_VERSION = TracedDeepseek, None
    with torch.no_grad():
        main_export(
            model,
            Path(out),
            task="text-generation-with-past",
            library_name="transformers",
            stateful=True,
            convert_tokenizer=True,
            ov_config=OVConfig(dtype="fp16"),
        )
    if weights != "bf16":
        quantize(Path(out) / "openvino_model.xml", QUANTIZED[weights])


def quantize(path: Path, options: dict[str, Any]) -> None:
    """Rewrites the IR with weights in fewer bits."""
    model = openvino.Core().read_model(path)
    small = nncf.compress_weights(model, **options)
    part = path.with_name("quantized.xml")
    openvino.save_model(small, part)
    del model, small
    for suffix in (".xml", ".bin"):
        part.with_suffix(suffix).replace(path.with_suffix(suffix))


if __name__ == "__main__":
    main(*sys.argv[1:])
