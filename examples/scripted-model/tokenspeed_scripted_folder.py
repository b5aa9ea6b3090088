# SPDX-License-Identifier: MIT
"""Makes the folder of a scripted model from texts: tokenizer, template, config, tiny weights.

    python -m tokenspeed_scripted_folder PLAYS.json FOLDER

PLAYS.json: {"plays": [{"cue": "text of the task", "answers": ["...", ...]}], "other": "..."}, with
answers as the model of the tokenizer's folder writes them, marks of reasoning and calls included.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokenspeed.models.build import build_model
from tokenspeed.models.hub import DEMO_FOLDER
from tokenspeed.text.tokenizer import Tokenizer

CONTEXT = 1 << 18
_BEFORE = (("", 0), (" ", 0), ("\n", 1))  # a word's ids depend on what stands before it
SHAPE = {
    "architectures": ["ScriptedForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def write_folder(
    folder: Path,
    plays: list[dict[str, Any]],
    other: str,
    *,
    base: Path = DEMO_FOLDER,
    header: str = "<|assistant|>",
) -> None:
    """A model in `folder`, with the tokenizer and template of `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = Tokenizer.from_folder(base)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    end = tokenizer.eos_ids[-1]
    script = {
        "header": ids(header),
        "end": end,
        "plays": [
            {
                "cues": [ids(before + play["cue"])[skip:] for before, skip in _BEFORE],
                "answers": [ids(text) for text in play["answers"]],
            }
            for play in plays
        ],
        "other": ids(other),
    }
    config = SHAPE | {"vocab_size": tokenizer.vocab_size, "eos_token_id": end, "script": script}
    (folder / "config.json").write_text(json.dumps(config))
    _write_weights(folder)


def _write_weights(folder: Path) -> None:
    model, _ = build_model(folder, torch.float32, torch.device("cpu"))
    tensors = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        for source in getattr(module, "sources", lambda: ())():
            name = f"{parent}.{source.name}" if parent else source.name
            tensors[name] = torch.zeros(source.shape)
    save_file(tensors, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plays", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    given = json.loads(options.plays.read_text())
    write_folder(options.folder, given["plays"], given.get("other", "Done."))


if __name__ == "__main__":
    main()
