# SPDX-License-Identifier: MIT
"""Where chat templates are found: a model folder's files, or an option. Renders nothing."""

from pathlib import Path

from tokenspeed.errors import ModelLoadError
from tokenspeed.text.tokenizer import read_json


def given_source(given: str) -> str:
    """The template that an option names: Jinja text as it is, or a file's. `ModelLoadError`."""
    if "{%" in given or "{{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read the chat template {given}: {error}") from None


def folder_sources(folder: Path) -> dict[str, str]:
    """A model folder's templates by name, none if it has none. `ModelLoadError` if malformed.

    `chat_template.jinja` and its siblings come before the entry in `tokenizer_config.json`.
    """
    found: dict[str, str] = {}
    entry = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, str):
        found["default"] = entry
    elif isinstance(entry, list):
        try:
            found = {str(e["name"]): str(e["template"]) for e in entry}
        except (KeyError, TypeError):
            raise ModelLoadError(f"chat_template in {folder} is malformed") from None
    if (folder / "chat_template.jinja").is_file():
        found["default"] = given_source(str(folder / "chat_template.jinja"))
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[file.stem] = given_source(str(file))
    return found
