"""docs/http.md, every route and field of the HTTP interface, from the server's own OpenAPI document.

`python -m scripts.http_page` writes it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import typer

from exeunt.server.api.app import create_app
from exeunt.server.api.service import Availability

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "http.md"
Schema = Mapping[str, Any]
_EXACT: Final = 2**53  # limits beyond are no longer exact in the document: their field's own words say them

_HEAD: Final = """# HTTP

(Written by `python -m scripts.http_page` from the server's own OpenAPI document, which `GET /openapi.json` gives, with
examples for the loaded model on `GET /docs`.)

Bodies are JSON, checked strictly: a field that is not listed, a number as a string or a value outside its limits is a
400 that names the field, its value and the limit. A body comes with the one header `Content-Type: application/json`; of
another type, which `curl -d` alone sends, or of none it is a 400 whose code is `content_type`. What a model can be
asked for depends on its bundle: `GET /info` says what it holds and which targets are certified. An error has one shape,
[ErrorResponse](#errorresponse), whatever its status; only what is no HTTP at all is refused in plain text, by the layer
that reads it. Where a table has no default a field must be given, or, in an answer, is always there; "absent" ones may
be left out. `GET /docs` and `GET /openapi.json` describe these routes and are not among them.

A request's time begins when its head is there. A body that is not complete within `--request-timeout`, or of which
nothing comes for 60 s, is a 408; one that its `Content-Encoding` says is compressed is a 415; a query, which no route
takes (probes and `/metrics` let one pass), is a 400. What cannot fit the model is refused by its length before it is
looked at: token ids by their number, a text by its bytes where these bound its tokens, as with byte-level BPE.
`/health` and `/ready` are answered to `HEAD` too.
"""
_FIRST: Final = (
    *("GenerateBody", "CompressionOptions", "EarlyExitOptions", "GenerateResponse"),
    *("StreamStep", "TokenInfo", "DepthInfo", "ScoreBody", "ErrorResponse", "ErrorDetail"),
)
"""What is asked for most stands first, the rest by name."""
_LIMITS: Final = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "gt": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} long",
    "maxLength": "at most {} long",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
}


def page() -> str:
    """The whole page."""
    document = create_app(Availability(), max_body_bytes=1).openapi()
    schemas: dict[str, Schema] = document["components"]["schemas"]
    named = {name: schema for name, schema in schemas.items() if "properties" not in schema}
    document = _inlined(document, named)
    schemas = document["components"]["schemas"]
    first = [name for name in _FIRST if name in schemas]
    order = [*first, *(name for name in sorted(schemas) if name not in first and name not in named)]
    parts = [_HEAD, *_routes(document), *_bodies({name: schemas[name] for name in order})]
    return "\n".join(parts).rstrip() + "\n"


def _inlined(part: Any, named: Mapping[str, Schema]) -> Any:
    """The document with schemas that have no fields, such as a choice of words, where they are spoken of."""
    if isinstance(part, dict):
        name = str(part.get("$ref", "")).rsplit("/", 1)[-1]
        if name in named:
            return {**named[name], **{key: each for key, each in part.items() if key != "$ref"}}
        return {key: _inlined(each, named) for key, each in part.items()}
    return [_inlined(each, named) for each in part] if isinstance(part, list) else part


def _routes(document: Schema) -> Iterator[str]:
    yield "## Routes\n"
    yield "| route | does | body | answers | statuses |\n| --- | --- | --- | --- | --- |"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            kinds = answers.get("200", {}).get("content", {})
            cells = (
                f"`{method.upper()} {path}`",
                operation["summary"],
                ", ".join(_links(operation.get("requestBody", {}).get("content", {}))),
                ", ".join(_links(kinds)),
                ", ".join(status for status in answers if status != "default"),
            )
            yield "| " + " | ".join(cells) + " |"
    yield ""
    stream = document["paths"]["/generate"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    yield "**A stream.** " + stream["schema"]["description"] + "\n"


def _links(content: Schema) -> list[str]:
    """What bodies of these content types look like."""
    found = []
    for kind, each in content.items():
        schema = each.get("schema", {})
        name = _type(schema)
        if kind == "application/json":
            found.append(name)
        else:
            found.append(f"`{kind}` of {name}" if "oneOf" in schema else f"`{kind}`")
    return found


def _bodies(schemas: Mapping[str, Schema]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield f"## {name}\n"
        if said := schema.get("description"):
            yield " ".join(said.split()) + "\n"
        needed = schema.get("required", ())
        yield "| field | type | default | meaning |\n| --- | --- | --- | --- |"
        for field, its in schema["properties"].items():
            limits = "; ".join(_limits(its))
            about = its.get("description", "").replace("|", "\\|").replace("\n", " ")
            about = f"{about} ({limits})" if limits else about
            null = " or null" if field in needed and _may_be_null(its) else ""
            yield f"| `{field}` | {_type(its)}{null} | {_default(its, field in needed)} | {about} |"
        yield ""


def _type(schema: Schema) -> str:
    """The type in words, but for null: where a field may be left out that says the same."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_type(each) for each in schema[key] if each.get("type") != "null")
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", ""))


def _may_be_null(schema: Schema) -> bool:
    return any(each.get("type") == "null" for each in schema.get("anyOf", ()))


def _default(schema: Schema, needed: bool) -> str:
    if "default" in schema:
        return f"`{json.dumps(schema['default'])}`"
    return "" if needed else "absent"


def _limits(schema: Schema) -> Iterator[str]:
    """What a value must keep to, those of a list's items among it."""
    for each in (schema, *schema.get("anyOf", ())):
        own = {key: each[key] for key in _LIMITS if key in each and abs(each[key]) < _EXACT}
        yield from (_LIMITS[key].format(_number(value)) for key, value in own.items())
        items = each.get("items", {})
        yield from (
            f"each {text.format(_number(items[key]))}" for key, text in _LIMITS.items() if key in items
        )


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    typer.echo(f"written to {PAGE.name}")


if __name__ == "__main__":
    typer.run(main)
