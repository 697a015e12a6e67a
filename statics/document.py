"""The JSON documents of this package (manifest, signatures, pointer, state): strict in, canonical out."""

import json
from collections.abc import Iterable
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from statics.errors import FormatTooNew, ManifestInvalid
from statics.version import FORMAT

DEPTH = 8
FIELDS = 256  # of one object
LARGEST = 2**53  # beyond it, other readers of JSON round

REMEDY = "build and publish the bundle again; these files are never edited by hand"


class Document(BaseModel):
    """Base of everything that is read from JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


D = TypeVar("D", bound=Document)


def load(model: type[D], raw: bytes, *, part: str, limit: int, remedy: str = REMEDY) -> D:
    """Read a document, its `format` (where it has one) first; raises ManifestInvalid, with `remedy`, and FormatTooNew."""
    try:
        value = strict_json(raw, limit)
    except ValueError as error:
        raise ManifestInvalid(
            part=part, found=str(error), expected="strict JSON in UTF-8", remedy=remedy
        ) from error
    if "format" in model.model_fields:
        _check_format(value.get("format"), part, remedy)
    try:
        # The checked value is written out again, so that pydantic's parser never sees what ours refused.
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise invalid(error, part, remedy) from error


def dump(document: Document) -> bytes:
    """The same document always gives the same bytes."""
    return canonical_json(document.model_dump(mode="json"))


def invalid(error: ValidationError, part: str, remedy: str = REMEDY) -> ManifestInvalid:
    """Pydantic's first complaint in our words."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    return ManifestInvalid(
        part=f"{part} {where}".rstrip(),
        found=f"{first['input']!r:.80} ({first['msg']})",
        expected="the fields of this document, nothing else",
        remedy=remedy,
    )


def canonical_json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def strict_json(raw: bytes, limit: int) -> dict[str, object]:
    """A JSON object without the tricks: what is read here is what `canonical_json` would write for it.

    Refused with a ValueError: duplicate keys, objects of more than FIELDS keys, fractions, NaN, -0, huge integers, deep
    nesting, half characters, a byte order mark, other encodings than UTF-8, and whatever follows the object.
    """
    if len(raw) > limit:
        raise ValueError(f"{len(raw)} bytes, more than {limit}")
    try:
        value = json.loads(
            raw.decode("utf-8"),  # decoded here: json.loads would guess UTF-16 and UTF-32
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_refuse,
            parse_constant=_refuse,
        )
    except RecursionError as error:
        raise ValueError(f"nesting deeper than {DEPTH}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} at the top, not an object")
    _check_depth(value, DEPTH)
    _check_text(value)
    return value


def _check_format(found: object, part: str, remedy: str) -> None:
    if type(found) is not int or found < 1:  # `type`, because True is an int
        raise ManifestInvalid(
            part=f"{part} format",
            found=f"{found!r:.80}",
            expected=f"an integer from 1 to {FORMAT}",
            remedy=remedy,
        )
    if found > FORMAT:
        raise FormatTooNew(
            part=part,
            found=f"format {found}",
            expected=f"format {FORMAT} or older",
            remedy="upgrade the service, or publish a bundle built for this version of it",
        )


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    pairs, result = list(pairs), dict[str, object]()
    if len(pairs) > FIELDS:
        raise ValueError(f"an object of {len(pairs)} fields, more than {FIELDS}")
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r:.80}")
        result[key] = value
    return result


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > LARGEST:
        raise ValueError(f"integer {text:.40} beyond 2**53")
    if text == "-0":  # to other readers a fraction
        raise ValueError("integer -0")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"number {text:.40} is not an integer")


def _check_depth(value: object, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if left == 0:
        raise ValueError(f"nesting deeper than {DEPTH}")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, left - 1)


def _check_text(value: object) -> None:
    """Escapes can spell half of a surrogate pair, which is no character and cannot be written again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character, {error.object[error.start]!a}") from error
