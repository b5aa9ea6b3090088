# SPDX-License-Identifier: MIT
"""`Canonical`: takes out of a conversation what clients rotate and templates lose, rule by rule.

Never changes what a user or the model said otherwise. Knows no dialect, no ids.
"""

import dataclasses
import json
import marshal
import re
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from tokenspeed.text.canonical_probe import Systems
from tokenspeed.text.conversation import Conversation, Tool
from tokenspeed.text.history_keys import plain_text

RULES = {
    "drop_attribution": "a first system text's line of billing or attribution, which rotates",
    "sort_tool_keys": "keys of tools' schemas in alphabetical order",
    "inline_system": "system messages stay in place in templates that refuse, move or lose them",
    "drop_empty_text": "empty text parts",
}
SYSTEM = frozenset({"system", "developer"})
_ATTRIBUTION = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
_REMINDER = "<system-reminder>"
_MAX_TOOLS = 4096  # that are kept in their canonical form
_NO_REFERENCES = 2  # marshal's version in which equal values are equal bytes

Messages = list[dict[str, Any]]


def chosen_rules(names: Sequence[str]) -> frozenset[str]:
    """Of an option's words: names of rules, `all` or `none`. `ValueError` for an unknown one."""
    if tuple(names) in ((), ("none",)):
        return frozenset()
    if tuple(names) == ("all",):
        return frozenset(RULES)
    for name in names:
        if name not in RULES:
            known = ", ".join(("all", "none", *RULES))
            raise ValueError(f"canonical_rules: unknown rule {name!r}; known: {known}")
    return frozenset(names)


class Canonical:
    """Thread-safe. `systems` is what the template does with system messages."""

    def __init__(self, rules: frozenset[str], systems: Systems) -> None:
        self.rules, self.systems = rules, systems
        # By a digest of what was sent: the schema in order if it was not, and a digest of that.
        self._tools: dict[bytes, tuple[dict[str, Any] | None, bytes]] = {}

    def apply(self, conversation: Conversation) -> tuple[Conversation, Counter[str], bytes]:
        """The conversation, how often each rule changed something in it, and a digest of what the
        model sees of the tools."""
        done: Counter[str] = Counter()
        messages = conversation.messages
        if "drop_attribution" in self.rules:
            messages = _drop_attribution(messages, done)
        if "drop_empty_text" in self.rules:
            messages = _drop_empty_text(messages, done)
        if "inline_system" in self.rules:
            messages = self._place_systems(messages, done)
        found = [self._tool(tool) for tool in conversation.tools]
        done["sort_tool_keys"] += sum(changed for _, _, changed in found)
        key = blake2b(b"".join(key for _, key, _ in found), digest_size=16).digest()
        if not +done:
            return conversation, +done, key
        tools = tuple(tool for tool, _, _ in found)
        return dataclasses.replace(conversation, messages=messages, tools=tools), +done, key

    def _tool(self, tool: Tool) -> tuple[Tool, bytes, bool]:
        """The tool in canonical form, a digest of what the model sees of it, and whether that is
        another form."""
        about = [tool.name, tool.description]
        sent = marshal.dumps([about, tool.parameters], _NO_REFERENCES)  # as telling as JSON
        raw = blake2b(sent, digest_size=16).digest()
        found = self._tools.get(raw)
        if found is None:
            text = json.dumps([about, tool.parameters])
            found = None, blake2b(text.encode(), digest_size=16).digest()
            if "sort_tool_keys" in self.rules:
                parameters = json.loads(json.dumps(tool.parameters, sort_keys=True))
                same = json.dumps([about, parameters])
                if same != text:
                    found = parameters, blake2b(same.encode(), digest_size=16).digest()
            if len(self._tools) >= _MAX_TOOLS:
                self._tools.clear()
            self._tools[raw] = found
        parameters, key = found
        if parameters is None:
            return tool, key, False
        return dataclasses.replace(tool, parameters=parameters), key, True

    def _place_systems(self, messages: Messages, done: Counter[str]) -> Messages:
        systems = self.systems
        if systems.keeps_all:
            return messages
        made: Messages = []
        leading = True
        for message in messages:
            if message.get("role") not in SYSTEM:
                leading = False
                made.append(message)
                continue
            changed = _renamed(message, systems)
            if leading and made and not systems.keeps_second:
                changed = _joined(made.pop(), message)
            elif not leading and not systems.keeps_inline:
                changed = _as_reminder(message)
            done["inline_system"] += changed is not message
            made.append(changed)
        return made if done["inline_system"] else messages


def _renamed(message: dict[str, Any], systems: Systems) -> dict[str, Any]:
    if message.get("role") != "developer" or systems.keeps_developer:
        return message
    return {**message, "role": "system"}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    texts = [plain_text(first.get("content")), plain_text(second.get("content"))]
    if None in texts:
        return second  # what is no text is refused later, by its place
    return {**first, "content": "\n\n".join(text for text in texts if text)}


def _as_reminder(message: dict[str, Any]) -> dict[str, Any]:
    text = plain_text(message.get("content"))
    if text is None:
        return message
    if not text.lstrip().startswith(_REMINDER):
        text = f"{_REMINDER}\n{text}\n</system-reminder>"
    return {"role": "user", "content": text}


def _drop_attribution(messages: Messages, done: Counter[str]) -> Messages:
    """Out of the first message, whole or from its parts' beginnings."""
    if not messages or messages[0].get("role") not in SYSTEM:
        return messages
    content = messages[0].get("content")
    parts = content if isinstance(content, list) else [content]
    kept = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        found = _ATTRIBUTION.match(text) if isinstance(text, str) else None
        if found is None or not isinstance(text, str):
            kept.append(part)
            continue
        done["drop_attribution"] += 1
        if rest := text[found.end() :]:
            kept.append({**part, "text": rest} if isinstance(part, dict) else rest)
    if not done["drop_attribution"]:
        return messages
    if not kept:
        return messages[1:]
    made = kept if isinstance(content, list) else kept[0]
    return [{**messages[0], "content": made}, *messages[1:]]


def _drop_empty_text(messages: Messages, done: Counter[str]) -> Messages:
    made: Messages | None = None
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        kept = [part for part in content if not _is_empty(part)]
        if len(kept) != len(content):
            done["drop_empty_text"] += len(content) - len(kept)
            made = made or list(messages)
            made[i] = {**message, "content": kept}
    return made or messages


def _is_empty(part: Any) -> bool:
    if isinstance(part, dict):
        return bool(part.get("type", "text") == "text" and part.get("text") == "")
    return bool(part == "")
