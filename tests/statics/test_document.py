"""statics.document: JSON without the tricks."""

import json
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from statics.document import DEPTH, FIELDS, LARGEST, canonical_json, load, strict_json
from statics.errors import ManifestInvalid
from statics.pointer import Pointer

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


def test_document_reads_so_many_fields_and_no_more() -> None:
    fields = {str(number): number for number in range(FIELDS)}
    assert strict_json(canonical_json({"a": fields}), 10**5)["a"] == fields
    with pytest.raises(ValueError, match=f"{FIELDS + 1} fields"):
        strict_json(canonical_json({"a": fields | {"more": 1}}), 10**5)


def test_document_says_what_to_do_about_it() -> None:
    for raw in (b"{", b'{"format": 0}', b'{"format": 1}'):
        with pytest.raises(ManifestInvalid, match="remedy: call home"):
            load(Pointer, raw, part="pointer", limit=1000, remedy="call home")


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
        (b'{"a": -0}', "-0"),
        (b'{"a": "\\ud83d"}', "half a character"),
        (b'{"\\udc00": 1}', "half a character"),
        (b'{"a": [["\\ud800\\ud800"]]}', "half a character"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "more than"),
    ],
)
def test_document_refuses_tricks(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json(raw, 1_000_000)


def test_document_writes_the_same_bytes_for_the_same_value() -> None:
    assert canonical_json({"b": "ж", "a": [1]}) == '{\n "a": [\n  1\n ],\n "b": "ж"\n}\n'.encode()


# Whatever comes in, what is read is what the canonical writer would have written for it.

_LEAVES = st.none() | st.booleans() | st.integers(-LARGEST, LARGEST) | st.text(max_size=8)
_BRANCHES = (
    _LEAVES | st.lists(_LEAVES, max_size=3) | st.dictionaries(st.text(max_size=4), _LEAVES, max_size=3)
)
_VALUES = (
    _BRANCHES | st.lists(_BRANCHES, max_size=3) | st.dictionaries(st.text(max_size=4), _BRANCHES, max_size=3)
)
_OBJECTS = st.dictionaries(st.text(max_size=4), _VALUES, max_size=4)
TRICKS = [
    b'{"a": 1, "a": 2}',
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": 1.0}',
    b'{"a": 1e2}',
    b'{"a": 9007199254740993}',
    b'{"a":' * 9 + b"1" + b"}" * 9,
    b'{"a": "\\ud83d"}',
    b"[1]",
]
_SNIPPETS = st.sampled_from(
    [b'"a"', b'"a": 1,', b"1.5", b"e9", b"-", b"NaN", b"\\ud800", b"\xef\xbb\xbf", b"{}", b" "]
)


@st.composite
def _changed(draw: st.DrawFn) -> bytes:
    """Canonical bytes after a few cuts, insertions and repetitions."""
    raw = canonical_json(draw(_OBJECTS))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        to = draw(st.integers(at, min(len(raw), at + 12)))
        raw = raw[:at] + draw(st.binary(max_size=2) | _SNIPPETS | st.just(2 * raw[at:to])) + raw[to:]
    return raw


def assert_canonical(raw: bytes, read: Callable[[bytes], object]) -> None:
    """What `read` takes is what another parser reads, within the limits, and can be written and read again."""
    try:
        value = read(raw)
    except ValueError:
        return
    assert isinstance(value, dict)
    assert json.dumps(from_json(raw, allow_inf_nan=False)) == json.dumps(value)
    assert strict_json(canonical_json(value), 10**6) == value
    pairs = 0

    def count(found: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal pairs
        pairs += len(found)
        return dict(found)

    json.loads(raw, object_pairs_hook=count)
    assert pairs == _fields(value, DEPTH)


def _fields(value: object, left: int) -> int:
    """How many keys there are in all, of a value that holds nothing but what a document may hold."""
    assert value is None or type(value) in {bool, int, str, list, dict}
    assert not isinstance(value, int) or abs(value) <= LARGEST
    if not isinstance(value, dict | list):
        return 0
    assert left > 0
    items = list(value.values()) if isinstance(value, dict) else value
    return sum(_fields(item, left - 1) for item in items) + (len(value) if isinstance(value, dict) else 0)


@given(_changed())
@example(b'{"a": 1}')
def test_document_takes_nothing_that_the_canonical_writer_would_not_write(raw: bytes) -> None:
    assert_canonical(raw, lambda raw: strict_json(raw, 10**6))


@given(_OBJECTS)
def test_document_reads_all_that_the_canonical_writer_writes(value: dict[str, object]) -> None:
    try:
        fits = _fields(value, DEPTH) >= 0
    except AssertionError:
        fits = False
    if fits:
        assert strict_json(canonical_json(value), 10**6) == value
    else:
        with pytest.raises(ValueError, match="nesting"):
            strict_json(canonical_json(value), 10**6)


@pytest.mark.parametrize("raw", TRICKS)
def test_document_canonical_check_catches_a_plain_reader(raw: bytes) -> None:
    """The negative control: the standard reader takes all of them."""
    json.loads(raw)
    with pytest.raises((AssertionError, ValueError)):
        assert_canonical(raw, json.loads)


@pytest.mark.parametrize("text", [b'"extra": 1, "seq"', b'"seq": 1, "seq"', b'"seq" ', b'"Seq"'])
def test_document_refuses_unknown_fields(text: bytes) -> None:
    raw = canonical_json({"format": 1, "channel": "dev", "seq": 1, "manifest": "0" * 64, "size": 1})
    assert load(Pointer, raw, part="pointer", limit=1000).seq == 1
    changed = raw.replace(b'"seq"', text)
    if text == b'"seq" ':  # the negative control: a space changes nothing
        assert load(Pointer, changed, part="pointer", limit=1000).seq == 1
        return
    with pytest.raises(ManifestInvalid):
        load(Pointer, changed, part="pointer", limit=1000)
