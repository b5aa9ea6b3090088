# SPDX-License-Identifier: MIT
"""Turns a training checkpoint into the files of a model folder, and proves that they are right.

`python export.py CHECKPOINT OUT`: OUT already has the tokenizer. The proof: transformers loads
the folder and computes the logits of the training code, for the main model and the MTP layer.
Refuses to know about training.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from model import DemoModel
from safetensors.torch import load_file, save_file
from shape import Shape
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

HERE = Path(__file__).parent
SIZE_LIMIT = 16_000_000
GENERATION = {"bos_token_id": None, "do_sample": True, "temperature": 0.7, "top_p": 0.95}


def transformers_class(mtp_layer: int) -> Any:
    """transformers looks for the MTP layer at 61, its place in the large model only."""
    keys = [rf"model\.layers\.{mtp_layer}\..*"]
    return type("Model", (DeepseekV3ForCausalLM,), {"_keys_to_ignore_on_load_unexpected": keys})


def save(checkpoint: Path, out: Path) -> None:
    state: dict[str, Tensor] = torch.load(checkpoint)
    weights = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for name, tensor in state.items()
    }
    # Written aside and renamed, so that a reader never sees half a file.
    save_file(weights, out / "model.safetensors.new", metadata={"format": "pt"})
    (out / "model.safetensors.new").chmod(0o644)
    (out / "model.safetensors.new").replace(out / "model.safetensors")
    size = (out / "model.safetensors").stat().st_size
    if size > SIZE_LIMIT:
        raise ValueError(f"model.safetensors has {size} bytes, the limit is {SIZE_LIMIT}")
    shutil.copy(HERE / "config.json", out / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(out)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    generation = GENERATION | {"eos_token_id": stops, "pad_token_id": stops[1]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@torch.no_grad()
def largest_difference(out: Path) -> tuple[float, float]:
    """Between the training code's float32 logits and those of transformers: main, MTP."""
    shape = Shape.read(out / "config.json")
    ours = DemoModel(shape)
    ours.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    theirs = transformers_class(shape.num_hidden_layers).from_pretrained(out, dtype=torch.float32)
    draft = MtpModel.from_pretrained(theirs)
    tokens = torch.randint(shape.vocab_size, (1, 129), generator=torch.Generator().manual_seed(0))
    hidden, drafted = ours.model(tokens)
    head = ours.model.embed_tokens.weight
    hidden_theirs = theirs.model(tokens[:, :-1]).last_hidden_state
    drafted_theirs = draft.forward_layer(
        0, hidden_theirs, torch.arange(1, 129)[None], None, input_ids=tokens[:, 1:]
    )
    pairs = ((hidden, hidden_theirs), (drafted, drafted_theirs))
    main, mtp = [((a - b) @ head.T).abs().max().item() for a, b in pairs]
    return main, mtp


def main(checkpoint: Path, out: Path) -> None:
    save(checkpoint, out)
    differences = largest_difference(out)
    if max(differences) > 1e-4:
        raise ValueError(f"transformers computes other logits, by {differences}")
    print(f"{(out / 'model.safetensors').stat().st_size} bytes; logits differ by {differences}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
