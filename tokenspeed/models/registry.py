# SPDX-License-Identifier: MIT
"""Which class builds which architecture: one line per model, and other packages' by entry point.

A package adds a model by an entry point of the group `tokenspeed.models` that is called as the
architecture in config.json and names a `CausalLM`.
"""

from dataclasses import dataclass
from importlib.metadata import entry_points

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from tokenspeed.models.llama import LlamaForCausalLM
from tokenspeed.models.minimax_m2 import MiniMaxM2ForCausalLM
from tokenspeed.models.qwen2 import Qwen2ForCausalLM
from tokenspeed.models.qwen3 import Qwen3ForCausalLM
from tokenspeed.models.qwen3_moe import Qwen3MoeForCausalLM

ENTRY_POINT_GROUP = "tokenspeed.models"


@dataclass(frozen=True)
class Architecture:
    """A model class; in multimodal checkpoints also where the language model's tensors are."""

    model: type[CausalLM]
    prefix: str = ""  # in front of every tensor name of the language model
    other: tuple[str, ...] = ()  # prefixes of the tensors that belong to other parts


ARCHITECTURES = {
    "DeepseekV2ForCausalLM": Architecture(DeepseekV2ForCausalLM),
    "DeepseekV3ForCausalLM": Architecture(DeepseekV3ForCausalLM),
    "KimiK25ForConditionalGeneration": Architecture(
        DeepseekV3ForCausalLM, "language_model.", ("vision_tower.", "mm_projector.")
    ),
    "LlamaForCausalLM": Architecture(LlamaForCausalLM),
    "MiniMaxM2ForCausalLM": Architecture(MiniMaxM2ForCausalLM),
    "Qwen2ForCausalLM": Architecture(Qwen2ForCausalLM),
    "Qwen3ForCausalLM": Architecture(Qwen3ForCausalLM),
    "Qwen3MoeForCausalLM": Architecture(Qwen3MoeForCausalLM),
}


def find_architecture(name: str) -> Architecture:
    """`ModelLoadError` lists what is supported, or says why a plug-in does not load."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    plugins = {plugin.name: plugin for plugin in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in plugins:
        known = ", ".join(sorted({*ARCHITECTURES, *plugins}))
        raise ModelLoadError(f"architecture {name} is not supported; supported: {known}")
    try:
        found = plugins[name].load()
    except (Exception, SystemExit) as error:  # foreign code: its failure is not our crash
        why = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"the plug-in of architecture {name} does not load: {why}") from None
    if not (isinstance(found, type) and issubclass(found, CausalLM)):
        raise ModelLoadError(f"the plug-in of architecture {name} gives no CausalLM: {found!r}")
    return Architecture(found)
