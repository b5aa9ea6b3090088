# SPDX-License-Identifier: MIT
"""Names to folders; what the hub can answer is played back, nothing here needs a network."""

import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tokenspeed.errors import ModelLoadError
from tokenspeed.models.hub import DEMO_FOLDER, UNWANTED, WANTED, resolve_model


def test_names_to_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model("demo") == DEMO_FOLDER
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "x.gguf").touch()
    refused = {
        str(tmp_path / "x.gguf"): "is a file; give the folder",
        str(tmp_path / "nothing"): "there is no such folder",
        "./nothing": "there is no such folder",
        "a/b/c": "there is no such folder",
        "": "there is no such folder",
        "a--b/c": "there is no such folder",
        "owner/a-model-that-is-not-cached": "not in the local cache, and the hub cannot be reached",
    }
    for name, message in refused.items():
        with pytest.raises(ModelLoadError, match=message):
            resolve_model(name)


def answer(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(GatedRepoError), "gated; accept its terms"),
        (answer(RepositoryNotFoundError), "no such model on the hub"),
        (answer(RevisionNotFoundError), "the hub has no revision 'v9'"),
        (answer(HfHubHTTPError), r"the hub cannot be reached.*\(HfHubHTTPError"),
        (LocalEntryNotFoundError("no"), "Give the path of a local folder"),
        (ConnectionError("refused"), r"the hub cannot be reached.*\(ConnectionError: refused\)"),
        (httpx.ConnectError("refused"), r"the hub cannot be reached.*\(ConnectError: refused\)"),
    ],
)
def test_what_the_hub_may_answer(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("tokenspeed.models.download.snapshot_download", refuse)
    with pytest.raises(ModelLoadError, match=message):
        resolve_model("owner/name", "v9")


def test_only_data_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("tokenspeed.models.download.snapshot_download", download)
    assert resolve_model("owner/name", "v9") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "v9")
    assert (asked["allow_patterns"], asked["ignore_patterns"]) == (WANTED, UNWANTED)

    def taken(file: str) -> bool:
        return any(fnmatch.fnmatch(file, p) for p in WANTED) and not any(
            fnmatch.fnmatch(file, p) for p in UNWANTED
        )

    wanted = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    unwanted = ["modeling_x.py", "pytorch_model.bin", "original/a.safetensors", "x.gguf"]
    assert all(map(taken, wanted))
    assert not any(map(taken, unwanted))
