# SPDX-License-Identifier: MIT
"""`OutputFormat` -> the structural tag of the content. Knows no tools, no reasoning, no dialect."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.text.conversation import FormatKind, OutputFormat
from tokenspeed.text.json_schema import check_size, narrowed
from tokenspeed.text.regexes import check_regex

MAX_CHOICES = 10_000

_KINDS: dict[str, FormatKind] = {  # vLLM's names
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}
_LARK_START = re.compile(r"^\s*\??start\s*:", re.MULTILINE)
_TOKEN_FIELDS = ("exclude_tokens", "trigger_tokens")


def structured_outputs(given: Any, field: str = "structured_outputs") -> OutputFormat | None:
    """vLLM's `structured_outputs`: an object with one of json, json_object, regex, choice, grammar
    and structural_tag. None if it asks for nothing."""
    if not isinstance(given, dict):
        raise RequestError(f"{field}: must be an object", field=field)
    asked = {name: value for name, value in given.items() if value not in (None, False)}
    unknown = sorted(asked.keys() - _KINDS.keys())
    if unknown:
        raise RequestError(
            f"{field}: {str(unknown[0])[:50]!r} is not supported",
            field=field,
            code="unsupported_parameter",
        )
    if len(asked) > 1:
        raise RequestError(f"{field}: give one of {', '.join(sorted(asked))}", field=field)
    for name, value in asked.items():
        if name == "json" and isinstance(value, str):
            value = _parsed(value, field)
        return OutputFormat(_KINDS[name], None if name == "json_object" else value)
    return None


def content_tag(output: OutputFormat, field: str, added: Mapping[str, int]) -> dict[str, Any]:
    """The tag. `RequestError` for what cannot be enforced. `added`: added tokens by their text."""
    value = output.value
    match output.kind:
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "json_schema":
            return {"type": "json_schema", "json_schema": narrowed(value, field)}
        case "regex":
            return _foreign("regex", check_regex(value, field))
        case "choice":
            return _choice(value, field)
        case "grammar":
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{field}: a grammar is a text", field=field)
            check_size(value, field)
            return _foreign("lark" if _LARK_START.search(value) else "ebnf", value)
        case "structural_tag":
            return _structural_tag(value, field, added)


def _foreign(syntax: str, text: str) -> dict[str, Any]:
    return {"type": "foreign", "syntax": syntax, "text": text, "quoted": False}


def _choice(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise RequestError(f"{field}: choice is a list of texts", field=field)
    if len(value) > MAX_CHOICES:
        why = f"{field}: at most {MAX_CHOICES} choices"
        raise RequestError(why, field=field, code="grammar_limit")
    elements = [{"type": "const_string", "value": text} for text in value]
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": elements}


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"{field}: is no JSON", field=field, code="invalid_grammar") from None


def _structural_tag(value: Any, field: str, added: Mapping[str, int]) -> dict[str, Any]:
    """xgrammar's structural tag, or the older `{"structures": .., "triggers": ..}`."""
    tag = _parsed(value, field) if isinstance(value, str) else value
    check_size(tag, field)
    if not isinstance(tag, dict):
        raise RequestError(f"{field}: a structural tag is an object", field=field)
    if "structures" in tag:
        tag = {"format": _triggered(tag)}
    if not isinstance(tag.get("format"), dict):
        raise RequestError(f"{field}: a structural tag has a format", field=field)
    copy: dict[str, Any] = json.loads(json.dumps(tag["format"]))
    todo: list[Any] = [copy]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            _check_tag(one, field, added)
            todo += [child for name, child in one.items() if name != "json_schema"]
        elif isinstance(one, list):
            todo += one
    return copy


def _triggered(tag: dict[str, Any]) -> dict[str, Any]:
    structures = tag["structures"] if isinstance(tag["structures"], list) else []
    tags = [
        {
            "type": "tag",
            "begin": one.get("begin"),
            "content": {"type": "json_schema", "json_schema": one.get("schema", True)},
            "end": one.get("end"),
        }
        for one in structures
        if isinstance(one, dict)
    ]
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def _check_tag(tag: dict[str, Any], field: str, added: Mapping[str, int]) -> None:
    """Schemas, regexes and named tokens of a client's tag; nothing of ours hides in it."""
    kind = tag.get("type")
    if kind == "foreign":
        raise RequestError(f"{field}: a tag has no type 'foreign'", field=field)
    if "json_schema" in tag:
        raw = kind == "qwen_xml_parameter" or tag.get("style", "json") != "json"
        tag["json_schema"] = narrowed(tag["json_schema"], field, raw_texts=raw)
    if kind == "regex":
        check_regex(tag.get("pattern"), field)
    if "token" in tag:
        tag["token"] = _token(tag["token"], field, added)
    for name in _TOKEN_FIELDS:
        if isinstance(tag.get(name), list):
            tag[name] = [_token(token, field, added) for token in tag[name]]
    if kind == "token_dispatch" and isinstance(tag.get("rules"), list):
        for rule in tag["rules"]:
            if isinstance(rule, list) and rule:
                rule[0] = _token(rule[0], field, added)


def _token(token: Any, field: str, added: Mapping[str, int]) -> Any:
    """An id. Only added tokens have names: the others' texts are matched as text."""
    if isinstance(token, str):
        if token not in added:
            raise RequestError(f"{field}: there is no token {token[:50]!r}", field=field)
        return added[token]
    return token
