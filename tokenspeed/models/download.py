# SPDX-License-Identifier: MIT
"""Downloads a model from the hub, or says why it cannot. Knows no model and no file's meaning."""

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
from tokenspeed.models.hub import nowhere


def download(name: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    """The folder with the files of hub id `name` that match. `ModelLoadError` says what to do."""
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except HFValidationError as error:
        raise ModelLoadError(nowhere(name)) from error
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


def _offline(name: str) -> str:
    return (
        f"{name}: not in the local cache, and the hub cannot be reached. Give the path of a local "
        "folder, or download the model where there is a network and set HF_HOME to that cache."
    )
