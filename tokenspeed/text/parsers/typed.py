# SPDX-License-Identifier: MIT
"""`TypedValue`: a parameter's raw text, as it comes, to JSON of a type that its schema allows.

Strings stream. Whatever may be of another type is held until it is known to be a string or ends;
then it is what it looks like, among the types allowed: `5` is a number where strings and numbers
are. Text that fits no allowed type is JSON if it is JSON, else a string: nothing is lost.
"""

import re

from tokenspeed.text.parsers.json_text import as_json, quoted
from tokenspeed.text.parsers.python_text import PythonValue

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_START = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]*)?)?")
_WHOLE = re.compile(r"(-?[0-9]+)(?:\.0*)?")
_WORDS = {"true": "boolean", "false": "boolean", "null": "null"}
_STARTS = {"{": "object", "[": "array"}
_DECIDED = 64  # characters after which what is no object and no array is a string


class TypedValue:
    """Give `feed` the text, then call `finish`. `kinds` as of `schema_kinds.kinds_of`."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self._kinds = kinds
        self._streams = False
        self._undecided = "string" in kinds
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """The JSON text that became certain."""
        if self._streams:
            return quoted(text)
        self._held.append(text)
        if self._undecided:
            return self._decide("".join(self._held))
        return ""

    def finish(self) -> str:
        """The rest, at the value's end."""
        if self._streams:
            return '"'
        return converted("".join(self._held), self._kinds)

    def _decide(self, text: str) -> str:
        """Whether it is a string becomes certain with the first characters."""
        head = text[:_DECIDED].strip()
        if head and _STARTS.get(head[0]) in self._kinds:
            self._undecided = False
            return ""
        if len(text) <= _DECIDED and self._may_be_other(head):
            return ""
        self._streams, self._held = True, []
        return '"' + quoted(text)

    def _may_be_other(self, head: str) -> bool:
        if not head:
            return self._kinds != {"string"}
        low = head.lower()
        if any(word.startswith(low) and kind in self._kinds for word, kind in _WORDS.items()):
            return True
        numbers = not self._kinds.isdisjoint(("integer", "number"))
        return numbers and _NUMBER_START.fullmatch(head) is not None


def converted(text: str, kinds: frozenset[str]) -> str:
    """`text` as JSON of one of `kinds`, if it can be read so."""
    bare = text.strip()
    low = bare.lower()
    if _WORDS.get(low) in kinds:
        return low
    if len(bare) <= _DECIDED and not kinds.isdisjoint(("integer", "number")):
        whole = _WHOLE.fullmatch(bare)
        if _NUMBER.fullmatch(bare) and ("number" in kinds or whole):
            return bare if "number" in kinds or whole is None else whole[1]
    json_text = as_json(bare)
    if json_text and _STARTS.get(bare[0]) in kinds:
        return json_text
    if low in ("null", "none") and "string" not in kinds:
        return "null"
    if "string" not in kinds:
        json_text = json_text or _from_python(bare, kinds)
        if json_text:
            return json_text
    return f'"{quoted(text)}"'


def _from_python(text: str, kinds: frozenset[str]) -> str | None:
    """An object or array in Python's words, such as `{'a': True}`, which models write too."""
    if text[:1] not in _STARTS or kinds.isdisjoint(_STARTS.values()):
        return None
    value = PythonValue()
    made, end = value.push(text, 0)
    return as_json(made) if value.done and end == len(text) else None
