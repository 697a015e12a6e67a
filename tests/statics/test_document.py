"""statics.document: JSON without the tricks."""

import pytest

from statics.document import canonical_json, strict_json

DEEPEST = b'{"a":' * 7 + b"[1]" + b"}" * 7


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": 1, "b": "\xd0\xb6"}', {"a": 1, "b": "ж"}),
        (b'{"a": 9007199254740992}', {"a": 2**53}),
        (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
        (b'{"a": [true, null]}', {"a": [True, None]}),
    ],
)
def test_document_reads_ordinary_json(raw: bytes, value: object) -> None:
    assert strict_json(raw, 1000) == value


def test_document_reads_eight_levels() -> None:
    assert "a" in strict_json(DEEPEST, 1000)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"b": {"a": 1, "\\u0061": 1}}', "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": 1.0}', "1.0"),
        (b'{"a": 9007199254740993}', "2\\*\\*53"),
        (b'{"a": -9007199254740993}', "2\\*\\*53"),
        (b'{"a": ' + b"9" * 5000 + b"}", "2\\*\\*53"),
        (b'{"a":' + DEEPEST + b"}", "nesting"),
        (b'{"a":' * 100_000, "nesting"),
        (b"[" * 100_000, "nesting"),
        (b"[]", "list"),
        (b"", "Expecting value"),
        (b'{"a": 1} x', "Extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\n"}', "control character"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "more than"),
    ],
)
def test_document_refuses_tricks(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json(raw, 1_000_000)


def test_document_writes_the_same_bytes_for_the_same_value() -> None:
    assert canonical_json({"b": "ж", "a": [1]}) == '{\n "a": [\n  1\n ],\n "b": "ж"\n}\n'.encode()
