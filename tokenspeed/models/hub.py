# SPDX-License-Identifier: MIT
"""A model's name to a local folder: the bundled demo, a folder, or a download from the hub.

Fetches only configuration, tokenizer and safetensors; never code, never pickles.
"""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

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
        raise ModelLoadError(_nowhere(name))
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except HFValidationError as error:
        raise ModelLoadError(_nowhere(name)) from error
    except GatedRepoError as error:
        why = "access to it is gated; accept its terms on the hub, then set HF_TOKEN"
        raise ModelLoadError(f"{name}: {why}") from error
    except RepositoryNotFoundError as error:
        why = (
            "no folder of that name, and no such model on the hub (or a private one: set HF_TOKEN)"
        )
        raise ModelLoadError(f"{name}: {why}") from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{name}: the hub has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelLoadError(_offline(name)) from error
    except Exception as error:  # of whatever HTTP library the hub's client uses
        raise ModelLoadError(f"{_offline(name)} ({type(error).__name__}: {error})") from error
    return Path(folder)


def _nowhere(name: str) -> str:
    return f"{name!r}: there is no such folder, and it is no hub id (owner/name)"


def _offline(name: str) -> str:
    return (
        f"{name}: not in the local cache, and the hub cannot be reached. Give the path of a local "
        "folder, or download the model where there is a network and set HF_HOME to that cache."
    )
