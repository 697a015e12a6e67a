"""`index.json`: written the same every time, and refused wherever it lies, whole or in a single field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from index.build import Entry, build
from index.layout import MAX_BYTES, IndexInvalid, Layout, padded, read_layout
from index.replies import Replies
from tests.index.matrices import Floats
from tests.index.tampering import read_fields, set_field, write_fields

FILES = ["shard-000.f16", "shard-001.f16", "shard-002.f16"]
DIGEST = "ab" * 32


@pytest.fixture
def graphed(
    tmp_path: Path,
    random_vectors: Callable[..., Floats],
    plain_entries: Callable[[int], list[Entry]],
) -> Path:
    """20 rows in shards of 8, vectors of the texts, and a graph: everything an index can have."""
    out = tmp_path / "graphed"
    names: dict[str, Any] = {"personas": ("calm", "lively"), "surfaces": ("speaker", "tv")}
    said = random_vectors(20, seed=1)
    build(plain_entries(20), random_vectors(20), out, said=said, kind="hnsw", shard_rows=8, **names)
    return out


@pytest.mark.parametrize(("dim", "width"), [(1, 16), (15, 16), (16, 16), (17, 32), (300, 304), (384, 384)])
def test_layout_padded_is_the_next_multiple_of_16(dim: int, width: int) -> None:
    assert padded(dim) == width


def test_layout_comes_back_as_saved(graphed: Path, tmp_path: Path) -> None:
    layout = read_layout(graphed)
    assert layout.kind == "hnsw"
    copy = tmp_path / "copy"
    copy.mkdir()
    layout.save(copy)
    assert (copy / "index.json").read_bytes() == (graphed / "index.json").read_bytes()
    assert read_layout(graphed) == Layout.model_validate_json((copy / "index.json").read_bytes())


def shards(*rows: int) -> list[dict[str, object]]:
    return [
        {"file": f"shard-{number:03d}.f16", "rows": count, "sha256": DIGEST}
        for number, count in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 1, "index.json format: found 1"),
        ("format", "2", "index.json format: found '2'"),
        ("dim", 0, "index.json dim: found 0"),
        ("dim", "20", "index.json dim: found '20'"),
        ("dim", 20.0, "index.json dim: found 20.0"),
        ("dim", True, "index.json dim: found True"),
        ("dim", 1 << 17, "index.json dim: found 131072"),
        ("dim", 40, "index.json padded: found 32, expected 48"),
        ("padded", 48, "index.json padded: found 48, expected 32"),
        ("rows", 21, "index.json rows: found 21, expected 20"),
        ("rows", -1, "index.json rows: found -1"),
        ("rows", 1 << 31, "index.json rows: found 2147483648"),
        ("items", -1, "index.json items: found -1"),
        ("items", "20", "index.json items: found '20'"),
        ("items_sha256", DIGEST.upper(), "index.json items_sha256: found"),
        ("items_sha256", DIGEST[1:], "index.json items_sha256: found"),
        ("items_sha256", DIGEST + "\n", "index.json items_sha256: found"),
        ("personas", ["calm", "calm"], "index.json personas: found"),
        ("personas", [""], "index.json personas: found"),
        ("personas", "calm", "index.json personas: found 'calm'"),
        ("surfaces", [f"s{i}" for i in range(33)], "index.json surfaces: found"),
        ("surfaces", ["tv", None], "index.json surfaces.1: found None"),
        ("shard_rows", 12, "index.json shard_rows modulo 8: found 4"),
        ("shard_rows", 0, "index.json shard_rows: found 0"),
        ("shard_rows", 16, "index.json shards rows: found"),
        ("shards", shards(20), "index.json shards rows: found [20], expected [8]"),
        ("shards", shards(8, 4, 8), "index.json shards rows: found [8, 4, 8], expected [8, 8, 8]"),
        ("shards", shards(8, 8, 4)[::-1], "index.json shards rows: found"),
        ("shards", [shards(8)[0], shards(8)[0], shards(8, 8, 4)[2]], "index.json shards: found"),
        ("shards", shards(8, 8, 12), "index.json rows: found 20, expected 28"),
        ("shards", [], "index.json rows: found 20, expected 0"),
        ("shards.2.rows", 0, "index.json shards.2.rows: found 0"),
        ("shards.1.file", "../shard-001.f16", "index.json shards: found"),
        ("shards.1.file", "/etc/passwd", "index.json shards: found"),
        ("shards.1.sha256", "", "index.json shards.1.sha256: found ''"),
        ("shards.1", {"file": FILES[1], "rows": 8}, "index.json shards.1.sha256: found"),
        ("said_rows", 19, "index.json said_rows: found 19, expected 20"),
        ("said", [], "index.json said_rows: found 20, expected 0"),
        ("said.0.file", "shard-000.f16", "index.json said: found"),
        ("graph.rows", 21, "index.json graph rows: found 21, expected 20"),
        ("graph.rows", 0, "index.json graph.rows: found 0"),
        ("graph.m", 1, "index.json graph.m: found 1"),
        ("graph.m", 257, "index.json graph.m: found 257"),
        ("graph.ef_search", 0, "index.json graph.ef_search: found 0"),
        ("graph.ef_search", 1 << 20, "index.json graph.ef_search: found 1048576"),
        ("graph.entry_point", 20, "index.json graph entry_point: found 20, expected 19"),
        ("graph.entry_point", -1, "index.json graph.entry_point: found -1"),
        ("graph.levels_sha256", "x", "index.json graph.levels_sha256: found 'x'"),
        ("graph.links_sha256", None, "index.json graph.links_sha256: found None"),
        ("surprise", 1, "index.json surprise: found 1"),
        ("shards.0.surprise", 1, "index.json shards.0.surprise: found 1"),
        ("graph.surprise", 1, "index.json graph.surprise: found 1"),
    ],
    ids=lambda value: repr(value)[:24] if not isinstance(value, str) else value[:40],
)
def test_layout_read_refuses_a_field_that_lies(graphed: Path, path: str, value: object, message: str) -> None:
    write_fields(graphed, read_fields(graphed))
    read_layout(graphed)  # the control: rewritten without a change, it is read
    set_field(graphed, path, value)
    with pytest.raises(IndexInvalid) as refusal:
        read_layout(graphed)
    assert message in str(refusal.value)
    with pytest.raises(IndexInvalid):
        Replies.load(graphed)


@pytest.mark.parametrize("field", sorted(Layout.model_fields))
def test_layout_read_refuses_a_missing_field(graphed: Path, field: str) -> None:
    fields = read_fields(graphed)
    del fields[field]
    write_fields(graphed, fields)
    with pytest.raises(IndexInvalid, match=f"index.json {field}: found .* expected Field required"):
        read_layout(graphed)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"dim": 20', '"dim": 20, "dim": 20', "dim"),
        ('"dim": 20', '"dim": 40, "dim": 20', "dim"),
        ('"graph": {', '"graph": null, "graph": {', "graph"),
        ('"file": "shard-001.f16"', '"file": "x", "file": "shard-001.f16"', "file"),
        ('"m": 32', '"m": 32, "\\u006d": 32', "m"),
    ],
    ids=["same", "other", "graph", "nested", "escaped"],
)
def test_layout_read_refuses_a_field_given_twice(graphed: Path, old: str, new: str, field: str) -> None:
    """Which one counts is every parser's own choice: a signature would cover another reading than ours."""
    path = graphed / "index.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert json.loads(path.read_text()) == json.loads(
        text
    )  # the control: to a parser that does not look, all is well
    with pytest.raises(IndexInvalid, match=f"index.json {field}: found the field twice"):
        read_layout(graphed)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"\0", b'{"format": NaN}', b'{"format": 2}garbage', b"\xff\xfe{}", b'"\xed\xa0\x80"',
        b'{"personas": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"dim": ' + b"9" * 5000 + b"}",
    ],
    ids="empty cut list null nul nan trailing utf16 surrogate deep digits".split(),
)  # fmt: skip
def test_layout_read_refuses_what_is_not_its_json(folder: Path, raw: bytes) -> None:
    read_layout(folder)  # the control
    (folder / "index.json").write_bytes(raw)
    with pytest.raises(IndexInvalid, match="^index.json"):
        read_layout(folder)


def test_layout_read_refuses_a_huge_file_unread(folder: Path) -> None:
    with (folder / "index.json").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(IndexInvalid, match=f"index.json: found {MAX_BYTES + 1} bytes, expected at most"):
        read_layout(folder)


def test_layout_read_refuses_a_crowd_of_rows_without_counting_them(folder: Path) -> None:
    """Two billion rows in shards of eight would be a list of a quarter of a billion."""
    import tracemalloc

    fields = read_fields(folder)
    rows = (1 << 31) - 1
    fields |= {"rows": rows, "shards": shards(rows)}
    write_fields(folder, fields)
    tracemalloc.start()
    try:
        with pytest.raises(IndexInvalid, match=r"shards rows: found \[2147483647\], expected \[8\]"):
            read_layout(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_layout_read_refuses_a_missing_file(folder: Path) -> None:
    (folder / "index.json").unlink()
    with pytest.raises(IndexInvalid, match="index.json: found no file"):
        read_layout(folder)


@pytest.mark.parametrize("name", ["shard-003.f16", "said-000.f16", "old.f16"])
def test_layout_read_refuses_a_shard_that_is_not_listed(folder: Path, name: str) -> None:
    """Two builds in one folder: the larger one's last shards would lie there unseen."""
    (folder / "canaries.safetensors").write_bytes(b"")
    read_layout(folder)  # the control: what is not a shard may lie there
    (folder / name).write_bytes(b"")
    with pytest.raises(IndexInvalid, match=f"{name}: found a shard that index.json does not list"):
        read_layout(folder)


def test_layout_read_takes_an_empty_index_only_when_it_says_so(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(IndexInvalid):
        Replies.load(folder)
    write_fields(folder, read_fields(folder) | {"rows": 0, "shards": []})
    layout = read_layout(folder)
    assert (layout.rows, layout.kind, layout.personas) == (0, "exact", ("calm", "lively"))
    with pytest.raises(IndexInvalid, match=r"items.arrow row 0: found vector 0, expected one of the 0"):
        Replies.load(folder)
