# SPDX-License-Identifier: MIT
"""Regular expressions from clients: what is refused before anything compiles them.

One pass, without recursion. A pattern is measured by the states that it unfolds to, so neither deep
nesting nor towers of repeats get through. Says nothing of syntax: the compiler does.
"""

import re

from tokenspeed.errors import RequestError

MAX_LENGTH = 4096  # characters
MAX_DEPTH = 64  # open parentheses
MAX_STATES = 20_000  # characters after every repeat was written out

_ATOM = re.compile(
    r"\\u\{[0-9A-Fa-f]{1,6}\}|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|\\c[A-Za-z]|\\[pP]\{[^}]*\}"
    r"|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.",
    re.DOTALL,
)
_REPEAT = re.compile(r"(?:[*+?]|\{(\d{0,9})(,?)(\d{0,9})\})\??")
_ESCAPED = {'"': '\\\\"', "\\\\": "\\\\\\\\", "\n": "\\\\n", "\t": "\\\\t", "\r": "\\\\r"}
_ESCAPED |= {r"\"": '\\\\"', r"\n": "\\\\n", r"\t": "\\\\t", r"\r": "\\\\r"}


def check_regex(pattern: object, field: str) -> str:
    """The pattern. `RequestError` for one that is too long, too deep or unfolds to too much."""
    if not isinstance(pattern, str) or not pattern:
        raise RequestError(f"{field}: a regex is a text that is not empty", field=field)
    if len(pattern) > MAX_LENGTH:
        raise _too_much(field, f"a regex has at most {MAX_LENGTH} characters")
    sums = [0]  # states of each open group, the outermost first
    at = 0
    while at < len(pattern):
        atom = _ATOM.match(pattern, at)
        text = atom.group() if atom else pattern[at]
        at += len(text)
        if text == "(":
            sums.append(0)
            if len(sums) > MAX_DEPTH:
                raise _too_much(field, f"a regex nests at most {MAX_DEPTH} groups")
            continue
        states = sums.pop() if text == ")" and len(sums) > 1 else 1
        if (repeat := _REPEAT.match(pattern, at)) is not None:
            states *= _times(repeat)
            at = repeat.end()
        sums[-1] += max(states, 1)
        if sums[-1] > MAX_STATES:
            raise _too_much(field, f"a regex unfolds to at most {MAX_STATES} characters")
    return pattern


def in_json_string(pattern: str) -> str:
    """The pattern of the JSON text of what the pattern matches: its quotes and such are escaped.

    Classes need not be: the compiler keeps what must be escaped out of them.
    """
    return "".join(_ESCAPED.get(atom, atom) for atom in _ATOM.findall(pattern))


def _times(repeat: re.Match[str]) -> int:
    """How often at most; one more than at least where there is no end."""
    low, comma, high = repeat.groups()
    if comma is None:
        return 2
    return int(high or 0) if high else int(low or 0) + (1 if comma else 0)


def _too_much(field: str, why: str) -> RequestError:
    return RequestError(f"{field}: {why}", field=field, code="grammar_limit")
