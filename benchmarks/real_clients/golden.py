# SPDX-License-Identifier: MIT
"""What a client sent, made fit to be kept: its structure without its words, names and places.

Stays: methods, paths, headers that matter, fields, types, orders, names of tools, the shapes of
schemas, the places of `cache_control`, and what the scripted model itself has said. Goes: texts of
more than a few words (equal ones become equal placeholders), ids (numbered), folders, days.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from real_clients.lineup import TASK
from real_clients.recorder import Exchange

AS_BEFORE = "as before"  # in the place of `tools` that are those of the request before
SHORT = 24  # characters: what is shorter is no text
WIDTH = 120
_HEADERS = re.compile(
    r"accept|content-type|authorization|user-agent|x-app|originator|session-id|thread-id"
    r"|x-client-request-id|(anthropic|x-claude|x-codex)-.*|x-stainless-(lang|retry-count|timeout)"
)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HEX = re.compile(r"(?<![0-9a-f])[0-9a-f]{16,}(?![0-9a-f])")
_DAY, _MOMENT = re.compile(r"20\d\d-\d\d-\d\d"), re.compile(r"(?<!\d)1\d{12}(?!\d)")
_SYSTEM = re.compile(r"\([^()]*(x86_64|aarch64|arm64)[^()]*\)")
_EDGES = re.compile(r"\A(\s*)(<system-reminder>\n)?(.*?)(\n</system-reminder>)?(\s*)\Z", re.DOTALL)
_BILLING = "x-anthropic-billing-header:"


def write_golden(
    file: Path, about: dict[str, Any], exchanges: Sequence[Exchange], paths: dict[str, str]
) -> None:
    """`paths`: folders, and what to call them. `about` is written first; its `answers` are what
    the scripted model has said."""
    cleaner = Cleaner(about["answers"], paths)
    answers = [cleaner.plain(one) for one in about["answers"]]
    requests, tools = [], None
    for one in exchanges:
        body = cleaner.value(json.loads(one.body)) if one.body else None
        if body and body.get("tools") is not None:
            tools, same = body["tools"], body["tools"] == tools
            body["tools"] = AS_BEFORE if same else tools
        headers = {k: cleaner.header(v) for k, v in one.headers.items() if _HEADERS.fullmatch(k)}
        requests.append(
            {"method": one.method, "path": one.path, "status": one.status, "headers": headers}
            | {"body": body}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_layout(about | {"answers": answers, "requests": requests}) + "\n")


class Cleaner:
    """Makes values of one client's requests fit to be kept; the same for the same, always."""

    def __init__(self, answers: Sequence[str], paths: dict[str, str]) -> None:
        self._paths = paths
        self._answers = [self._placed(one) for one in answers]
        self._ids: dict[str, int] = {}
        self._texts: dict[str, int] = {}

    def plain(self, text: str) -> str:
        """Without folders, ids and days."""
        text = _UUID.sub(self._numbered(lambda n, _: f"{n:08x}-0000-7000-8000-{0:012}"), text)
        text = _HEX.sub(self._numbered(lambda n, was: f"{n:0{len(was)}x}"), self._placed(text))
        return _MOMENT.sub("1700000000000", _DAY.sub("2026-01-01", text))

    def header(self, text: str) -> str:
        """A header's value, which may name versions by their days."""
        text = _SYSTEM.sub("(...)", self._placed(text))
        text = _UUID.sub(self._numbered(lambda n, _: f"{n:08x}-0000-7000-8000-{0:012}"), text)
        return _MOMENT.sub("1700000000000", text)

    def value(self, given: Any, key: str = "") -> Any:
        """`key` is the name that the value has in its object."""
        if isinstance(given, dict):
            ours = given.get("type") == "tool_use"
            return {k: self._member(k, v, ours) for k, v in given.items()}
        if isinstance(given, list):
            return [self.value(one, key) for one in given]
        return self._text(given, key) if isinstance(given, str) else given

    def _member(self, key: str, value: Any, ours: bool) -> Any:
        if ours and key == "input":
            return json.loads(self.plain(json.dumps(value)))
        return self.value(value, key)

    def _text(self, text: str, key: str) -> str:
        if key == "signature":
            return "c2VhbGVk"
        known = key in ("arguments", "encrypted_content") or text == TASK
        if known or text.startswith(_BILLING) or self._said(text):
            return self.plain(text)
        if key == "description":
            return "What it is for."
        if len(text) <= SHORT or not re.search(r"\s", text):
            return self.plain(text)
        return self._words(text)

    def _said(self, text: str) -> bool:
        placed = self._placed(text).strip()
        return any(placed in answer for answer in self._answers)

    def _words(self, text: str) -> str:
        found = _EDGES.match(text)
        before, opening, words, closing, after = found.groups() if found else ("", "", text, "", "")
        number = self._texts.setdefault(words, len(self._texts) + 1)
        return f"{before}{opening or ''}Words {number}.{closing or ''}{after}"

    def _placed(self, text: str) -> str:
        for path, name in self._paths.items():
            text = text.replace(path, name)
        return text

    def _numbered(self, write: Callable[[int, str], str]) -> "Callable[[re.Match[str]], str]":
        def one(found: "re.Match[str]") -> str:
            return write(self._ids.setdefault(found[0], len(self._ids) + 1), found[0])

        return one


def _layout(value: Any, indent: int = 0) -> str:
    """JSON; what fits into a line is one."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + len(line) <= WIDTH or not isinstance(value, dict | list) or not value:
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {_layout(v, indent + 1)}" for k, v in value.items()]
    else:
        parts = [_layout(one, indent + 1) for one in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    space = " " * (indent + 1)
    return f"{opening}\n{space}" + f",\n{space}".join(parts) + f"\n{space[1:]}{closing}"
