# SPDX-License-Identifier: MIT
"""`response_format` and vLLM's `structured_outputs`, as `OutputFormat`. Compiles nothing.

Shapes: https://platform.openai.com/docs/guides/structured-outputs and vLLM's structured outputs.
"""

from typing import Any

from tokenspeed.errors import RequestError
from tokenspeed.text.conversation import OutputFormat
from tokenspeed.text.output_format import structured_outputs

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def output_format_of(
    response_format: Any, structured: Any, field: str = "response_format"
) -> OutputFormat | None:
    """What the content must look like; None if anything goes. Both at once are an error."""
    first = None if response_format is None else response_format_of(response_format, field)
    second = None if structured is None else structured_outputs(structured)
    if first is not None and second is not None:
        raise RequestError(
            f"{field}: give this or structured_outputs, not both", field="structured_outputs"
        )
    return first or second


def output_field(structured: Any) -> str:
    """Which of the two fields a mistake is in."""
    return "structured_outputs" if structured else "response_format"


def response_format_of(given: Any, field: str = "response_format") -> OutputFormat | None:
    """text, json_object, json_schema with the schema in an object of its own (as in
    /v1/chat/completions) or beside its name (as in /v1/responses), structural_tag."""
    if not isinstance(given, dict):
        raise RequestError(f"{field}: must be an object", field=field)
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return OutputFormat("json_object")
        case "json_schema":
            return OutputFormat("json_schema", _schema(given, field))
        case "structural_tag":
            return OutputFormat("structural_tag", given)
        case other:
            why = "must be text, json_object, json_schema or structural_tag"
            raise RequestError(f"{field}.type: {why}, got {str(other)[:50]!r}", field=field)


def refuse_guided(name: str) -> RequestError:
    """For a field that vLLM has given up; `name` is one of `GUIDED`."""
    now = name.removeprefix("guided_")
    return RequestError(
        f"{name}: write structured_outputs: {{{now!r}: ...}} instead",
        field=name,
        code="unsupported_parameter",
    )


def _schema(given: dict[str, Any], field: str) -> Any:
    about = given.get("json_schema", given)
    if not isinstance(about, dict):
        raise RequestError(f"{field}.json_schema: must be an object", field=field)
    name = about.get("name")
    if name is not None and not isinstance(name, str):
        raise RequestError(f"{field}.json_schema.name: must be a string", field=field)
    if about.get("strict") not in (None, True, False):
        raise RequestError(f"{field}.json_schema.strict: must be true or false", field=field)
    schema = about.get("schema")
    if not isinstance(schema, dict | bool):
        raise RequestError(f"{field}.json_schema.schema: must be an object", field=field)
    return schema
