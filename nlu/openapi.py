"""The OpenAPI document of the HTTP gateway, made from the protobuf descriptors and the models that the gateway itself
parses with, so that it cannot say anything else; and the page that shows it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from pydantic import BaseModel

Shape = Descriptor | type[BaseModel] | Literal["text", "html"] | None
Schema = dict[str, Any]

_REF = "#/components/schemas/"
_SCALARS: dict[int, Schema] = {
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},  # JSON numbers lose the last digits
    FieldDescriptor.TYPE_UINT64: {"type": "string", "format": "uint64"},
}
_MOMENT: Schema = {"type": "string", "format": "date-time"}

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;width:100%}"
    "td{padding:.25rem .75rem .25rem 0;border-top:1px solid #ddd;vertical-align:top}"
    "h2{margin-top:2.5rem}h3{margin-bottom:.25rem}a{color:#0550ae}"
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be asked over HTTP. `errors` is the shape of every answer that is not 200."""

    verb: Literal["get", "post"]
    path: str
    about: str
    gives: Shape
    takes: Shape = None
    errors: Shape = None


def document(operations: Sequence[Operation], *, version: str) -> Schema:
    """The document, as data for json.dumps."""
    schemas: dict[str, Schema] = {}
    paths: dict[str, Schema] = {}
    for operation in operations:
        answers: Schema = {"200": {"description": "OK", **_content(operation.gives, schemas)}}
        if operation.errors is not None:
            answers["default"] = {"description": "not done, and why", **_content(operation.errors, schemas)}
        described: Schema = {"summary": operation.about, "responses": answers}
        if operation.takes is not None:
            described["requestBody"] = {"required": True, **_content(operation.takes, schemas)}
        paths.setdefault(operation.path, {})[operation.verb] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "Chorus NLU", "version": version},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],  # whether one is needed is the deployment's to say
    }


def page(described: Schema) -> str:
    """The document to be read; one page without anything from elsewhere."""
    schemas = described["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Chorus NLU</title><style>{_STYLE}</style>",
        f"<h1>Chorus NLU {html.escape(described['info']['version'])}</h1>",
        '<p>The same for machines: <a href="/openapi.json">openapi.json</a>.</p><table>',
    ]
    for path, verbs in described["paths"].items():
        for verb, operation in verbs.items():
            takes = _link(_schema_of(operation.get("requestBody", {})))
            gives = _link(_schema_of(operation["responses"]["200"]))
            parts.append(
                f"<tr><td><code>{verb.upper()} {html.escape(path)}</code><td>{html.escape(operation['summary'])}"
                f"<td>{takes}{' &rarr; ' if takes else ''}{gives}"
            )
    parts.append("</table><h2>Shapes</h2>")
    for name, schema in schemas.items():
        parts.append(f'<h3 id="{html.escape(name)}"><code>{html.escape(name)}</code></h3>')
        if "enum" in schema:
            parts.append(f"<p>{', '.join(f'<code>{html.escape(str(v))}</code>' for v in schema['enum'])}</p>")
            continue
        rows = (
            f"<tr><td><code>{html.escape(field)}</code><td>{_link(each)}"
            for field, each in schema.get("properties", {}).items()
        )
        parts.append(f"<table>{''.join(rows)}</table>")
    return "".join(parts)


def _content(shape: Shape, schemas: dict[str, Schema]) -> Schema:
    match shape:
        case None:
            return {}
        case "text" | "html":
            kind = "text/plain" if shape == "text" else "text/html"
            return {"content": {kind: {"schema": {"type": "string"}}}}
        case Descriptor():
            return {"content": {"application/json": {"schema": _message(shape, schemas)}}}
        case _:
            return {"content": {"application/json": {"schema": _model(shape, schemas)}}}


def _model(model: type[BaseModel], schemas: dict[str, Schema]) -> Schema:
    described = model.model_json_schema(ref_template=_REF + "{model}")
    schemas.update(described.pop("$defs", {}))
    schemas[model.__name__] = described
    return {"$ref": _REF + model.__name__}


def _message(message: Descriptor, schemas: dict[str, Schema]) -> Schema:
    name = message.full_name
    if name not in schemas:
        schemas[name] = {}  # a message may hold itself
        schemas[name] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {field.name: _field(field, schemas) for field in message.fields},
        }
    return {"$ref": _REF + name}


def _field(field: FieldDescriptor, schemas: dict[str, Schema]) -> Schema:
    of = field.message_type
    if of is not None and of.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _value(of.fields_by_name["value"], schemas)}
    value = _value(field, schemas)
    return {"type": "array", "items": value} if field.is_repeated else value


def _value(field: FieldDescriptor, schemas: dict[str, Schema]) -> Schema:
    if field.enum_type is not None:
        return _enum(field.enum_type, schemas)
    if field.message_type is None:
        return _SCALARS[field.type]
    if field.message_type.full_name == "google.protobuf.Timestamp":
        return _MOMENT
    return _message(field.message_type, schemas)


def _enum(enum: EnumDescriptor, schemas: dict[str, Schema]) -> Schema:
    schemas[enum.full_name] = {"type": "string", "enum": [value.name for value in enum.values]}
    return {"$ref": _REF + enum.full_name}


def _schema_of(part: Schema) -> Schema:
    content: dict[str, Schema] = part.get("content", {})
    return next((each["schema"] for each in content.values()), {})


def _link(schema: Schema) -> str:
    """A schema in a few words, with a link where it has a name."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].removeprefix(_REF))
        return f'<a href="#{name}"><code>{name}</code></a>'
    if schema.get("type") == "array":
        return f"list of {_link(schema['items'])}"
    if "anyOf" in schema:
        return " or ".join(_link(each) for each in schema["anyOf"])
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map to {_link(schema['additionalProperties'])}"
    named = schema.get("enum") or [schema["const"]] if "const" in schema or "enum" in schema else []
    return html.escape(", ".join(map(str, named)) or schema.get("format") or schema.get("type", ""))
