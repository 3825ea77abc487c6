"""The OpenAPI document: what the framework writes, made to say what is true of this server."""

from typing import Any, Final

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from exeunt.server.api.auth import OPEN_PATHS
from exeunt.server.api.errors import ErrorResponse
from exeunt.server.api.examples import body_examples
from exeunt.server.api.responses import GenerateResponse, StreamStep
from exeunt.server.api.service import Availability

_SCHEMAS: Final = "#/components/schemas/{model}"
_SCHEME: Final = "ApiKey"


def describe(app: FastAPI, availability: Availability, *, key_required: bool) -> None:
    """Complete the application's OpenAPI document: errors, streams, the API key, examples for the loaded model."""
    build = app.openapi
    made: dict[str, Any] = {}

    def described() -> dict[str, Any]:
        if not made:
            made.update(build())
            _say_how_errors_look(made)
            _name_the_events(made)
            _ask_for_the_key(made, key_required)
        _show_examples(made, body_examples(availability.service))
        return made

    app.openapi = described  # type: ignore[method-assign] # the framework's documented way to change the document


def _say_how_errors_look(document: dict[str, Any]) -> None:
    """One shape for every error. The 422 that the framework assumes is a 400 here."""
    _add_schemas(document, ErrorResponse)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {
                "description": "Any other error; all have this shape.",
                "content": {"application/json": {"schema": _reference(ErrorResponse)}},
            }
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _name_the_events(document: dict[str, Any]) -> None:
    """What the `data:` lines of a stream hold."""
    _add_schemas(document, StreamStep, GenerateResponse, ErrorResponse)
    answer = document["paths"]["/generate"]["post"]["responses"]["200"]
    answer["content"]["text/event-stream"] = {
        "schema": {
            "description": "Each `data:` line is one of these as JSON: a step, the summary after the last one "
            "(without texts and tokens), or an error that ends the stream. The last line is `data: [DONE]`.",
            "oneOf": [_reference(model) for model in (StreamStep, GenerateResponse, ErrorResponse)],
        }
    }


def _ask_for_the_key(document: dict[str, Any], required: bool) -> None:
    """The security scheme, and which routes it is for."""
    document["components"]["securitySchemes"] = {
        _SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": "The server's API key (`--api-key`) as `Authorization: Bearer KEY`."
            + ("" if required else " This server was started without one and asks for none."),
        }
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{_SCHEME: []}]
            if path not in OPEN_PATHS and not required:
                operation["security"].append({})  # or nothing


def _show_examples(document: dict[str, Any], examples: dict[str, dict[str, Any]]) -> None:
    """A body for each route that takes one, by its path."""
    for path, example in examples.items():
        document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] = example


def _add_schemas(document: dict[str, Any], *models: type[Any]) -> None:
    _, found = models_json_schema([(model, "serialization") for model in models], ref_template=_SCHEMAS)
    schemas = document["components"]["schemas"]
    for name, schema in found["$defs"].items():
        schemas.setdefault(name, schema)


def _reference(model: type[Any]) -> dict[str, str]:
    return {"$ref": _SCHEMAS.format(model=model.__name__)}
