# SPDX-License-Identifier: MIT
"""`region_of`: in which part of a conversation a token of its prompt stands. Knows no template.

Parts are found by their own words in the decoded prompt, in order, so that any template will do.
Costs a decoding of the prompt; asked for only when something is to be explained.
"""

from tokenspeed.text.conversation import Conversation
from tokenspeed.text.history_keys import plain_text
from tokenspeed.text.tokenizer import Tokenizer

_HEAD = 64  # characters by which a part is found


def region_of(ids: list[int], index: int, conversation: Conversation, tokenizer: Tokenizer) -> str:
    """ "tools", "system", "message N" (N counts from 0) or "prompt", what the template adds."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    place = len(tokenizer.decode(ids[: index + 1], skip_special_tokens=False))
    best, at = "prompt", -1
    for start, name in _starts(text, conversation):
        if at < start < place:
            best, at = name, start
    return best


def _starts(text: str, conversation: Conversation) -> list[tuple[int, str]]:
    """Where each part's own words begin."""
    found, after = [], 0
    for tool in conversation.tools:
        if (start := text.find(tool.name)) >= 0:
            found.append((start, "tools"))
            break
    for i, message in enumerate(conversation.messages):
        head = _head(message)
        start = text.find(head, after) if head else -1
        if start < 0:
            continue
        after = start + len(head)
        system = i == 0 and message.get("role") in ("system", "developer")
        found.append((start, "system" if system else f"message {i}"))
    return found


def _head(message: dict[str, object]) -> str:
    content = (plain_text(message.get("content")) or "").strip()
    if content:
        return content[:_HEAD]
    calls = message.get("tool_calls")
    call = calls[0] if isinstance(calls, list) and calls else None
    function = call.get("function") if isinstance(call, dict) else None
    return str(function.get("name", "")) if isinstance(function, dict) else ""
