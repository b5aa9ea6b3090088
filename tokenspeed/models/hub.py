# SPDX-License-Identifier: MIT
"""A model's name to a local folder: the bundled demo, a folder, or a download from the hub.

Asks only for configuration, tokenizer and safetensors; never code, never pickles.
"""

import os
import re
from pathlib import Path

from tokenspeed.errors import ModelLoadError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "assets" / "demo"
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "consolidated*"]  # sub-folders and second copies of the weights
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The folder that holds model `name`. `ModelLoadError` says what to do instead."""
    if name == DEMO:
        return DEMO_FOLDER
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ModelLoadError(f"{name} is a file; give the folder with config.json and safetensors")
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if looks_local or not HUB_ID.fullmatch(name):
        raise ModelLoadError(nowhere(name))
    # The hub's client is not for models that are here: its import takes long.
    from tokenspeed.models.download import download

    return download(name, revision, WANTED, UNWANTED)


def nowhere(name: str) -> str:
    """What is wrong with a name that leads nowhere."""
    return f"{name!r}: there is no such folder, and it is no hub id (owner/name)"
