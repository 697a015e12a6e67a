"""statics.bundle: building and comparing."""

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics import disk
from statics.bundle import Bundle, Part, build, diff
from statics.errors import (
    DiskFull,
    FileMissing,
    FileUnexpected,
    FileUnsafe,
    FingerprintMismatch,
    ManifestInvalid,
    StaticsError,
)
from statics.signing import Keyring
from statics.verify import verify

SERVICE = "1.2.3"


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_bundle_holds_the_parts(bundle: Bundle) -> None:
    held = content(bundle.path)
    assert held.pop("manifest.json")
    assert held == {
        "vectorizer.main/model.onnx": bytes(range(256)) * 20,
        "vectorizer.main/tokenizer.json": b"{}",
        "vectorizer.main/vectorizer.json": b"[300]",
        "head.emotion/head.json": b'{"task": "emotion"}',
        "head.emotion/weights.safetensors": b"emotion" * 300,
        "head.intent/head.json": b'{"task": "intent"}',
        "head.intent/weights.safetensors": b"intent" * 400,
        "rules.clock/rules.txt": b"",
    }


def test_bundle_verifies_as_built(bundle: Bundle) -> None:
    assert verify(bundle.path, service=SERVICE) == bundle


def test_bundle_finds_its_folders(bundle: Bundle) -> None:
    head = bundle.component("head", "intent")
    assert (bundle.folder(head) / "head.json").read_bytes() == b'{"task": "intent"}'
    assert [each.name for each in bundle.of_kind("head")] == ["emotion", "intent"]
    assert head.requires == {"vectorizer": "f" * 64}


def test_bundle_of_the_same_inputs_has_the_same_digest(make_bundle: Callable[..., Bundle]) -> None:
    assert make_bundle().digest == make_bundle().digest
    assert make_bundle().digest != make_bundle(seq=2).digest
    assert make_bundle().digest != make_bundle(files={"head.intent": {"head.json": b"{}"}}).digest


def test_bundle_does_not_depend_on_the_order_of_parts(
    tmp_path: Path, make_parts: Callable[..., list[Part]]
) -> None:
    options: dict[str, Any] = {"requires_service": "", "created": datetime(2026, 1, 1, tzinfo=UTC)}
    parts = make_parts()
    assert (
        build(parts, tmp_path / "a", **options).digest == build(parts[::-1], tmp_path / "b", **options).digest
    )


def test_bundle_is_signed_with_the_key(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, keyring: Keyring
) -> None:
    signed = make_bundle(signing_key=key)
    assert (
        verify(signed.path, service=SERVICE, keyring=keyring, require_signature=True).digest == signed.digest
    )
    assert signed.digest == make_bundle().digest


def test_bundle_replaces_a_bundle(tmp_path: Path, make_parts: Callable[..., list[Part]]) -> None:
    out = tmp_path / "deep" / "out"
    build(make_parts(), out, requires_service="", seq=1)
    second = build(make_parts(files={"head.intent": {"other": b"x"}}), out, requires_service="", seq=2)
    assert verify(out, service=SERVICE) == second
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "a bundle there"])
def test_bundle_that_a_check_refuses_is_never_there(
    tmp_path: Path, make_parts: Callable[..., list[Part]], there: bool
) -> None:
    out, seen = tmp_path / "out" / "bundle", []
    parts = make_parts()
    if there:
        build(parts, out, requires_service=">=1", seq=1)
    before = content(tmp_path / "out")

    def refusing(bundle: Bundle) -> None:
        assert content(tmp_path / "out").items() >= before.items()
        seen.append(verify(bundle.path, service=SERVICE))  # it is whole already
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        build(parts, out, requires_service=">=1", seq=2, check=refusing)
    assert content(tmp_path / "out") == before
    assert build(parts, out, requires_service=">=1", seq=2, check=seen.append).digest == seen[1].digest
    assert seen[0].manifest.components == seen[1].manifest.components


@pytest.mark.parametrize("what", ["file", "folder", "empty", "link", "json"])
def test_bundle_never_replaces_anything_else(
    tmp_path: Path, make_parts: Callable[..., list[Part]], what: str
) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to(build(make_parts(), tmp_path / "real", requires_service="").path)
    else:
        out.mkdir()
    if what == "folder":
        (out / "thesis.txt").write_text("mine")
    if what == "json":
        (out / "manifest.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises(FileUnexpected, match="no bundle"):
        build(make_parts(), out, requires_service="")
    assert {name: before[name] for name in before} == {
        name: data for name, data in content(tmp_path).items() if not name.startswith("sources")
    } | {name: data for name, data in before.items() if name.startswith("sources")}


@pytest.mark.parametrize("what", ["symlink", "folder", "fifo", "Upper.json", "with space", "x" * 65, "имя"])
def test_bundle_refuses_sources_that_are_not_plain(
    tmp_path: Path, make_parts: Callable[..., list[Part]], what: str
) -> None:
    parts = make_parts()
    folder = parts[1].folder
    if what == "symlink":
        (folder / "link").symlink_to("/etc/passwd")
    elif what == "folder":
        (folder / "deeper").mkdir()
    elif what == "fifo":
        os.mkfifo(folder / "fifo")
    else:
        (folder / what).write_text("x")
    with pytest.raises(FileUnsafe, match="head.emotion/"):
        build(parts, tmp_path / "out", requires_service="")
    assert not (tmp_path / "out").exists()


def test_bundle_copies_sources_that_have_several_names(
    tmp_path: Path, make_parts: Callable[..., list[Part]]
) -> None:
    parts = make_parts()
    (tmp_path / "cache").hardlink_to(parts[0].folder / "model.onnx")
    build(parts, tmp_path / "out", requires_service="")
    verify(tmp_path / "out", service=SERVICE)


def test_bundle_refuses_an_empty_part(tmp_path: Path, make_parts: Callable[..., list[Part]]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileMissing, match="head.new .*an empty folder"):
        build([*make_parts(), Part("head", "new", tmp_path / "empty")], tmp_path / "out", requires_service="")


def test_bundle_refuses_a_missing_part(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="head.new"):
        build([Part("head", "new", tmp_path / "nothing")], tmp_path / "out", requires_service="")


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        ("../head", "a", FileUnsafe),
        ("head", "..", FileUnsafe),
        ("Head", "a", FileUnsafe),
        ("head", "", FileUnsafe),
        ("manifest", "json", ManifestInvalid),
        ("manifest", "sig", ManifestInvalid),
        ("head", "intent", ManifestInvalid),  # a twin
    ],
)
def test_bundle_refuses_names(
    tmp_path: Path, make_parts: Callable[..., list[Part]], kind: str, name: str, error: type[StaticsError]
) -> None:
    parts = make_parts()
    with pytest.raises(error):
        build([*parts, Part(kind, name, parts[0].folder)], tmp_path / "out", requires_service="")
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


@pytest.mark.parametrize(
    "options",
    [
        {"channel": "Prod"},
        {"seq": -1},
        {"requires_service": "newest"},
        {"expires": datetime(2020, 1, 1, tzinfo=UTC)},
        {"created": datetime(2026, 1, 1)},
    ],
)
def test_bundle_refuses_options(make_bundle: Callable[..., Bundle], options: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid, match=next(iter(options)) if "expires" not in options else "expires"):
        make_bundle(**options)


def test_bundle_refuses_heads_of_another_vectorizer(
    tmp_path: Path, make_parts: Callable[..., list[Part]]
) -> None:
    with pytest.raises(FingerprintMismatch, match="head.emotion: found made with vectorizer e"):
        build(make_parts(trained_on="e" * 64), tmp_path / "out", requires_service="")
    assert not (tmp_path / "out").exists()
    build(make_parts(trained_on="e" * 64, made="e" * 64), tmp_path / "out", requires_service="")


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_bundle_that_fails_leaves_the_old_one(
    tmp_path: Path, make_parts: Callable[..., list[Part]], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    old = build(make_parts(), tmp_path / "out", requires_service="")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_exchanged", lambda new, old: False)
        patch.setattr(os, call, full)
        with pytest.raises(DiskFull):
            build(make_parts(), tmp_path / "out", requires_service="", seq=2)
    assert verify(tmp_path / "out", service=SERVICE) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sources"]


def test_bundle_diff_counts_what_a_holder_of_the_old_fetches(make_bundle: Callable[..., Bundle]) -> None:
    old = make_bundle()
    new = make_bundle(
        files={
            "head.intent": {"head.json": b'{"task": "intent"}', "weights.safetensors": b"new" * 100},
            "head.topic": {
                "weights.safetensors": b"new" * 100,
                "emotion.json": b'{"task": "emotion"}',
                "x": b"12",
            },
        }
    )
    changes = diff(old.manifest, new.manifest)
    assert [(change.folder, change.what, change.bytes_to_pull) for change in changes] == [
        ("head.emotion", "same", 0),
        ("head.intent", "changed", 300),
        ("head.topic", "added", 2),  # its weights come with head.intent, its emotion.json is held
        ("rules.clock", "same", 0),
        ("vectorizer.main", "same", 0),
    ]
    assert changes[1].old == old.component("head", "intent")
    assert changes[1].new == new.component("head", "intent")
    back = diff(new.manifest, old.manifest)
    assert (back[2].what, back[2].new, back[2].bytes_to_pull) == ("removed", None, 0)


def test_bundle_diff_sees_a_change_of_requirements_alone(
    tmp_path: Path, make_parts: Callable[..., list[Part]]
) -> None:
    old = build(make_parts(), tmp_path / "a", requires_service="")
    new = build(make_parts(trained_on="e" * 64, made="e" * 64), tmp_path / "b", requires_service="")
    assert [(change.what, change.bytes_to_pull) for change in diff(old.manifest, new.manifest)] == [
        ("changed", 0),
        ("changed", 0),
        ("same", 0),
        ("changed", 0),
    ]


def test_bundle_finds_its_components_in_its_own_folder_or_beside_others(
    bundle: Bundle, tmp_path: Path
) -> None:
    head = bundle.component("head", "intent")
    assert bundle.folder(head) == bundle.path / "head.intent"
    root = tmp_path / "root"
    (root / "components").mkdir(parents=True)
    (root / "bundles" / "new").mkdir(parents=True)
    assert (
        Bundle(root / "bundles" / "new", bundle.manifest, "").folder(head)
        == root / "components" / head.digest
    )
    whole = shutil.copytree(bundle.path, root / "bundles" / "old")  # as older versions left it
    assert Bundle(whole, bundle.manifest, "").folder(head) == whole / "head.intent"


def test_bundle_that_is_built_beside_a_folder_of_that_name_is_whole(
    make_parts: Callable[..., list[Part]], tmp_path: Path
) -> None:
    (tmp_path / "components").mkdir()
    built = build(make_parts(), tmp_path / "bundles" / "coffee", requires_service="")
    for component in built.manifest.components:
        assert built.folder(component) == tmp_path / "bundles" / "coffee" / component.folder
    verify(built.path, service="1.2.3")
