"""statics.manifest: what parses, what is refused, and the fingerprint chain."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from statics.bundle import Bundle
from statics.errors import FileMissing, FingerprintMismatch, FormatTooNew, ManifestInvalid
from statics.manifest import (
    Component,
    File,
    Manifest,
    check_chain,
    dump,
    files_digest,
    is_name,
    manifest_digest,
    parse,
)

EMPTY = hashlib.sha256(b"").hexdigest()


def component(kind: str, name: str, **extra: Any) -> Component:
    files = (File(name="x", size=0, sha256=EMPTY),)
    return Component(kind=kind, name=name, digest=files_digest(files), files=files, **extra)


def manifest(*components: Component) -> Manifest:
    created = datetime(2026, 1, 2, tzinfo=UTC)
    return Manifest(
        format=1, channel="dev", seq=7, created=created, requires_service=">=1", components=components
    )


@pytest.fixture
def edited() -> Callable[[Callable[[Any], object]], bytes]:
    """The bytes of a good manifest after an edit of its JSON."""

    def edit(change: Callable[[Any], object]) -> bytes:
        value = json.loads(dump(manifest(component("head", "intent", requires={"vectorizer": "abc"}))))
        change(value)
        return json.dumps(value).encode()

    return edit


def test_manifest_parses_what_it_dumps(bundle: Bundle) -> None:
    raw = dump(bundle.manifest)
    assert parse(raw) == bundle.manifest
    assert dump(parse(raw)) == raw
    assert raw.endswith(b"}\n")


def test_manifest_dump_is_these_bytes() -> None:
    assert dump(manifest()) == (
        b'{\n "channel": "dev",\n "components": [],\n "created": "2026-01-02T00:00:00Z",\n "expires": null,\n'
        b' "format": 1,\n "requires_service": ">=1",\n "seq": 7\n}\n'
    )


def test_manifest_writes_what_came_later_only_where_it_is_set() -> None:
    """Manifests without the two keep their digest, and older code goes on reading them."""
    plain = manifest()
    told = plain.model_copy(update={"restores": "a" * 64, "note": "вернули: p99 вырос"})
    assert b"restores" not in dump(plain) and b"note" not in dump(plain)
    extra = {"restores": "a" * 64, "note": "вернули: p99 вырос"}
    assert json.loads(dump(told)) == json.loads(dump(plain)) | extra
    assert parse(dump(told)) == told and parse(dump(plain)) == plain
    assert b'"expires": null' in dump(plain)  # which was there from the beginning


@pytest.mark.parametrize("note", ["", "x" * 257, "two\nlines", "\x1b[2J", "\u202egpj.exe", "zero\u200bwidth"])
def test_manifest_refuses_notes_that_could_forge_a_page(note: str, edited: Callable[..., bytes]) -> None:
    with pytest.raises(ManifestInvalid, match="note"):
        parse(edited(lambda value: value.update(note=note)))
    assert parse(edited(lambda value: value.update(note="p99 up 40 %, ticket 12 - назад"))).note


@pytest.mark.parametrize("restores", ["", "a" * 63, "A" * 64, 12])
def test_manifest_refuses_what_is_no_digest_to_restore(
    restores: object, edited: Callable[..., bytes]
) -> None:
    with pytest.raises(ManifestInvalid, match="restores"):
        parse(edited(lambda value: value.update(restores=restores)))


@given(st.data())
def test_manifest_says_what_its_bytes_said(data: st.DataObject) -> None:
    """However its bytes are changed: it is refused, or no field of it was dropped, added or read otherwise."""
    raw = dump(
        manifest(component("head", "intent", requires={"vectorizer": "abc"}), component("index", "main"))
    )
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(raw)))
        to = data.draw(st.integers(at, min(len(raw), at + 10)))
        piece = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"note": "x",', b'"seq": 8,', raw[at:to] * 2])
        )
        raw = raw[:at] + piece + raw[to:]
    try:
        found = parse(raw)
    except (ManifestInvalid, FormatTooNew):
        return
    said, written = json.loads(raw), json.loads(dump(found))
    assert without_defaults(said) == without_defaults(written)


def without_defaults(value: Any) -> Any:
    components = [
        {name: each for name, each in component.items() if each != {}} for component in value["components"]
    ]
    return {name: each for name, each in (value | {"components": components}).items() if each is not None}


def test_manifest_digest_is_over_raw_bytes() -> None:
    assert manifest_digest(b"{}\n") == hashlib.sha256(b"{}\n").hexdigest()
    assert manifest_digest(b"{}") != manifest_digest(b"{}\n")


def test_manifest_component_digest_is_over_sorted_lines() -> None:
    files = (File(name="b", size=0, sha256=EMPTY), File(name="a", size=0, sha256=EMPTY))
    expected = hashlib.sha256(f"a 0 {EMPTY}\nb 0 {EMPTY}\n".encode()).hexdigest()
    assert files_digest(files) == files_digest(files[::-1]) == expected


def test_manifest_keeps_times_in_whole_utc_seconds() -> None:
    local = datetime(2026, 1, 2, 6, 0, 0, 999, tzinfo=timezone(timedelta(hours=3)))
    made = Manifest(format=1, channel="dev", seq=1, created=local, requires_service="", components=())
    assert made.created == datetime(2026, 1, 2, 3, tzinfo=UTC)


def test_manifest_refuses_times_without_zone() -> None:
    with pytest.raises(ValidationError, match="zone"):
        Manifest(
            format=1, channel="dev", seq=1, created=datetime(2026, 1, 2), requires_service="", components=()
        )


def test_manifest_accepts_an_edit_that_changes_nothing(edited: Callable[..., bytes]) -> None:
    assert parse(edited(lambda value: None)).component("head", "intent").requires == {"vectorizer": "abc"}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(extra=1),
        lambda m: m.pop("seq"),
        lambda m: m.update(seq=-1),
        lambda m: m.update(seq="7"),
        lambda m: m.update(seq=True),
        lambda m: m.update(seq=2**53),
        lambda m: m.update(channel="Dev"),
        lambda m: m.update(channel=".."),
        lambda m: m.update(created="2026-01-02T00:00:00"),
        lambda m: m.update(created="2026-01-02T00:00:00+00:00"),
        lambda m: m.update(created="2026-02-30T00:00:00Z"),
        lambda m: m.update(created=1767312000),
        lambda m: m.update(expires="2026-01-01T00:00:00Z"),
        lambda m: m.update(requires_service="newest"),
        lambda m: m.update(components={}),
        lambda m: m["components"].append(m["components"][0]),
        lambda m: m["components"][0].update(extra=1),
        lambda m: m["components"][0].update(kind="../head"),
        lambda m: m["components"][0].update(name="."),
        lambda m: m["components"][0].update(kind="manifest", name="json"),
        lambda m: m["components"][0].update(kind="manifest", name="sig"),
        lambda m: m["components"][0].update(digest="0" * 64),
        lambda m: m["components"][0].update(files=[]),
        lambda m: m["components"][0].update(requires={"Vectorizer": "x"}),
        lambda m: m["components"][0].update(requires={"vectorizer": "x\ny"}),
        lambda m: m["components"][0].update(requires={"vectorizer": 1}),
        lambda m: m["components"][0]["files"].append(m["components"][0]["files"][0]),
        lambda m: m["components"][0]["files"][0].update(name="a/b"),
        lambda m: m["components"][0]["files"][0].update(size=1),
        lambda m: m["components"][0]["files"][0].update(size=-1),
        lambda m: m["components"][0]["files"][0].update(size=2**53),
        lambda m: m["components"][0]["files"][0].update(sha256=EMPTY.upper()),
        lambda m: m["components"][0]["files"][0].update(sha256=EMPTY + "\n"),
    ],
)
def test_manifest_refuses_edits(edited: Callable[..., bytes], change: Callable[[Any], object]) -> None:
    with pytest.raises(ManifestInvalid):
        parse(edited(change))


@pytest.mark.parametrize("found", [0, -1, True, "1", None, 1.0])
def test_manifest_refuses_formats_that_are_none(edited: Callable[..., bytes], found: object) -> None:
    with pytest.raises(ManifestInvalid, match="manifest-invalid: manifest.json"):
        parse(edited(lambda value: value.update(format=found)))


def test_manifest_names_a_newer_format_before_anything_else(edited: Callable[..., bytes]) -> None:
    with pytest.raises(FormatTooNew, match="found format 2, expected format 1 or older"):
        parse(edited(lambda value: value.update(format=2, channel=["of", "another", "shape"], extra=1)))


def test_manifest_refuses_duplicate_keys(edited: Callable[..., bytes]) -> None:
    raw = edited(lambda value: None)
    with pytest.raises(ManifestInvalid, match="duplicate key 'seq'"):
        parse(raw[:-1] + b', "seq": 9}')


def test_manifest_refuses_more_than_four_mib(edited: Callable[..., bytes]) -> None:
    raw = edited(lambda value: None)
    assert parse(raw + b" " * (4 * 1024 * 1024 - len(raw))).seq == 7
    with pytest.raises(ManifestInvalid, match="4194305 bytes, more than 4194304"):
        parse(raw + b" " * (4 * 1024 * 1024 - len(raw) + 1))


@pytest.mark.parametrize("name", ["a", "head.json", "a-b_c.0", "...", "x" * 64, "con"])
def test_manifest_allows_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "a/b", "/a", "../a", "a\\b", "A", "CON", "a b", "a\n", "\na", "a\0", "x" * 65,
        "x" * 300, "é", "е", "a\u2215b", "a\uff0eb", "\u202ea", "a:b", "a*", "~", "$a", "%2e", "a\tb", "ﬁ",
    ],
)  # fmt: skip
def test_manifest_refuses_names(name: str) -> None:
    assert not is_name(name)


def test_manifest_finds_components() -> None:
    made = manifest(component("head", "a"), component("head", "b"), component("index", "a"))
    assert made.component("head", "b").folder == "head.b"
    assert [each.folder for each in made.of_kind("head")] == ["head.a", "head.b"]
    assert made.of_kind("rules") == ()


def test_manifest_says_which_components_there_are() -> None:
    with pytest.raises(FileMissing, match="head.c: found only head.a, expected a component c of kind head"):
        manifest(component("head", "a")).component("head", "c")


def test_manifest_refuses_twins_whose_folders_meet() -> None:
    with pytest.raises(ValidationError, match="a.b.c twice"):
        manifest(component("a.b", "c"), component("a", "b.c"))


@pytest.mark.parametrize(
    "components",
    [
        (),
        (component("head", "rules-only"),),
        (component("vectorizer", "main"),),
        (
            component("vectorizer", "main", provides={"vectorizer": "v1"}),
            component("head", "a", requires={"vectorizer": "v1"}),
            component("index", "a", requires={"vectorizer": "v1"}),
        ),
    ],
)
def test_manifest_chain_holds(components: tuple[Component, ...]) -> None:
    check_chain(manifest(*components))


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (
            (
                component("vectorizer", "main", provides={"vectorizer": "v1"}),
                component("head", "good", requires={"vectorizer": "v1"}),
                component("head", "stale", requires={"vectorizer": "v0"}),
            ),
            "head.stale: found made with vectorizer v0, expected vectorizer v1, the bundle's; remedy: make",
        ),
        ((component("head", "a", requires={"vectorizer": "v0"}),), "head.a: found made with vectorizer v0"),
        (
            (component("vectorizer", "main"), component("head", "a", requires={"vectorizer": "v0"})),
            "head.a: found made with vectorizer v0",
        ),
        (
            (component("vectorizer", "a"), component("vectorizer", "b")),
            "vectorizer.a, vectorizer.b: found 2 vectorizers, expected at most one",
        ),
    ],
)
def test_manifest_chain_breaks(components: tuple[Component, ...], message: str) -> None:
    with pytest.raises(FingerprintMismatch, match=message):
        check_chain(manifest(*components))


@pytest.mark.parametrize("wrong", ["components", "files"])
def test_manifest_is_refused_at_its_first_wrong_part(
    edited: Callable[[Callable[[Any], object]], bytes], wrong: str
) -> None:
    """A report of a million mistakes takes gigabytes; the manifest that makes it, a few megabytes."""

    def spoil(value: Any) -> None:
        (value if wrong == "components" else value["components"][0])[wrong] = [{}] * 10_000

    with pytest.raises(ManifestInvalid) as refused:
        parse(edited(spoil))
    assert isinstance(refused.value.__cause__, ValidationError)
    assert refused.value.__cause__.error_count() < 10


@pytest.mark.parametrize(("clauses", "taken"), [(64, True), (65, False)])
def test_manifest_bounds_the_range_of_services(
    edited: Callable[[Callable[[Any], object]], bytes], clauses: int, taken: bool
) -> None:
    raw = edited(lambda value: value.update(requires_service=",".join([">=1"] * clauses)))
    if taken:
        assert parse(raw).seq == 7
    else:
        with pytest.raises(ManifestInvalid, match="256 characters"):
            parse(raw)
