"""statics.verify: every way in which a bundle can be wrong, each beside the same bundle unharmed."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from statics import disk, signing, verify
from statics.bundle import Bundle
from statics.errors import (
    DigestMismatch,
    Expired,
    FileMissing,
    FileUnexpected,
    FileUnsafe,
    FingerprintMismatch,
    FormatTooNew,
    ManifestInvalid,
    ServiceMismatch,
    SignatureInvalid,
    SignatureMissing,
    SizeMismatch,
    StaticsError,
)
from statics.signing import Keyring, generate_key

SERVICE = "1.2.3"
FILES = [
    "vectorizer.main/model.onnx",
    "vectorizer.main/tokenizer.json",
    "head.intent/head.json",
    "head.intent/weights.safetensors",
    "head.emotion/head.json",
]


@pytest.fixture
def signed(make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey, keyring: Keyring) -> Bundle:
    """A signed bundle, seen to be accepted as it is."""
    bundle = make_bundle(signing_key=key)
    assert verify.verify(bundle.path, service=SERVICE, keyring=keyring) == bundle
    return bundle


def rewrite(bundle: Bundle, change: Callable[[Any], object]) -> None:
    """Edit the manifest of an unsigned bundle."""
    path = bundle.path / "manifest.json"
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def test_verify_returns_the_bundle(signed: Bundle) -> None:
    assert verify.verify(signed.path, service=SERVICE) == signed


@pytest.mark.parametrize("name", FILES)
def test_verify_refuses_any_flipped_byte_of_a_file(
    signed: Bundle, keyring: Keyring, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "CHUNK", 1000)  # so that the larger files have several
    path, source = signed.path / name, random.Random(name)
    good = path.read_bytes()
    for at in {0, len(good) - 1, *(source.randrange(len(good)) for _ in range(40))}:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << source.randrange(8)]) + good[at + 1 :])
        with pytest.raises(DigestMismatch) as caught:
            verify.verify(signed.path, service=SERVICE, keyring=keyring)
        assert caught.value.part == name
    path.write_bytes(good)
    verify.verify(signed.path, service=SERVICE, keyring=keyring)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_verify_refuses_any_flipped_byte_of_what_is_signed(
    signed: Bundle, keyring: Keyring, name: str
) -> None:
    path, source = signed.path / name, random.Random(name)
    good = path.read_bytes()
    for at in {0, len(good) - 1, *(source.randrange(len(good)) for _ in range(100))}:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << source.randrange(8)]) + good[at + 1 :])
        with pytest.raises(SignatureInvalid):
            verify.verify(signed.path, service=SERVICE, keyring=keyring)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("by", [-1, 1])
def test_verify_refuses_other_sizes(signed: Bundle, name: str, by: int) -> None:
    path = signed.path / name
    path.write_bytes(path.read_bytes()[:by] if by < 0 else path.read_bytes() + b"\0")
    with pytest.raises(SizeMismatch, match=name):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_an_emptied_file(signed: Bundle) -> None:
    (signed.path / FILES[0]).write_bytes(b"")
    with pytest.raises(SizeMismatch, match="found 0 bytes, expected 5120 bytes"):
        verify.verify(signed.path, service=SERVICE)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_verify_refuses_a_missing_file(signed: Bundle, name: str) -> None:
    (signed.path / name).unlink()
    with pytest.raises(FileMissing, match=name):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_a_missing_folder(signed: Bundle) -> None:
    shutil.rmtree(signed.path / "head.intent")
    with pytest.raises(FileMissing, match="head.intent"):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="nothing"):
        verify.verify(tmp_path / "nothing", service=SERVICE)


@pytest.mark.parametrize(
    "name", ["extra", ".hidden", "head.intent/extra", "head.new/head.json", "manifest.json.bak"]
)
def test_verify_refuses_an_extra_file(signed: Bundle, name: str) -> None:
    (signed.path / name).parent.mkdir(exist_ok=True)
    (signed.path / name).write_bytes(b"")
    with pytest.raises(FileUnexpected, match=name.split("/")[0]):
        verify.verify(signed.path, service=SERVICE)


@pytest.mark.parametrize("name", ["head.new", "head.intent/deeper"])
def test_verify_refuses_an_extra_folder(signed: Bundle, name: str) -> None:
    (signed.path / name).mkdir()
    with pytest.raises(FileUnexpected, match=name):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_an_extra_link(signed: Bundle) -> None:
    (signed.path / "head.intent" / "link").symlink_to("/etc/passwd")
    with pytest.raises(FileUnexpected, match="head.intent/link"):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_a_renamed_file(signed: Bundle) -> None:
    (signed.path / FILES[2]).rename(signed.path / "head.intent" / "head2.json")
    with pytest.raises(
        FileMissing, match="head.intent/head.json: found 1 missing, and an unknown head2.json"
    ):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_swapped_files(signed: Bundle) -> None:
    first, second, aside = signed.path / FILES[0], signed.path / FILES[3], signed.path.parent / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    with pytest.raises(SizeMismatch):
        verify.verify(signed.path, service=SERVICE)


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "manifest.sig"])
@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_verify_refuses_links_to_the_right_bytes(
    signed: Bundle, keyring: Keyring, name: str, link: str
) -> None:
    path, outside = signed.path / name, signed.path.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside) if link == "symlink" else path.hardlink_to(outside)
    with pytest.raises(FileUnsafe, match="one name"):
        verify.verify(signed.path, service=SERVICE, keyring=keyring)


def test_verify_shared_admits_files_with_other_names(signed: Bundle, keyring: Keyring) -> None:
    """As installers leave them that link packages from a cache; the bytes are still checked, and symbolic links refused."""
    for number, path in enumerate(path for path in sorted(signed.path.rglob("*")) if path.is_file()):
        (signed.path.parent / f"cache-{number}").hardlink_to(path)
    with pytest.raises(FileUnsafe, match="2 names"):
        verify.verify(signed.path, service=SERVICE, keyring=keyring)
    assert verify.verify(signed.path, service=SERVICE, keyring=keyring, shared=True) == signed
    path = signed.path / "head.intent" / "head.json"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DigestMismatch, match="head.intent/head.json"):
        verify.verify(signed.path, service=SERVICE, keyring=keyring, shared=True)
    path.unlink()
    path.symlink_to(signed.path.parent / "cache-0")
    with pytest.raises(FileUnsafe, match="symbolic link"):
        verify.verify(signed.path, service=SERVICE, keyring=keyring, shared=True)


def test_verify_refuses_a_linked_folder(signed: Bundle) -> None:
    (signed.path / "head.intent").rename(signed.path.parent / "outside")
    (signed.path / "head.intent").symlink_to(signed.path.parent / "outside")
    with pytest.raises(FileUnsafe, match="head.intent"):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_a_linked_bundle(signed: Bundle) -> None:
    (signed.path.parent / "link").symlink_to(signed.path)
    with pytest.raises(FileUnsafe, match="link"):
        verify.verify(signed.path.parent / "link", service=SERVICE)


def test_verify_refuses_a_pipe_without_waiting_for_it(signed: Bundle) -> None:
    (signed.path / FILES[0]).unlink()
    os.mkfifo(signed.path / FILES[0])
    with pytest.raises(FileUnsafe, match="no regular file"):
        verify.verify(signed.path, service=SERVICE)


def test_verify_hashes_the_file_it_checked(signed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapping a good file in after the open changes nothing: the descriptor stays on the bad one."""
    path, good = signed.path / FILES[0], signed.path.parent / "good"
    shutil.copyfile(path, good)
    path.write_bytes(bytes(5120))
    check = disk.check_content

    def swap_then_check(*args: Any, **options: Any) -> None:
        if args[1] == FILES[0]:
            good.rename(path)
        check(*args, **options)

    monkeypatch.setattr(disk, "check_content", swap_then_check)
    with pytest.raises(DigestMismatch):
        verify.verify(signed.path, service=SERVICE)


def test_verify_refuses_a_newer_format(bundle: Bundle) -> None:
    rewrite(bundle, lambda value: value.update(format=2, new_field=True))
    with pytest.raises(FormatTooNew, match="upgrade the service"):
        verify.verify(bundle.path, service=SERVICE)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"null", b'{"format": 1, "format": 1}', b'{"format": NaN}', b'{"format":' + b"[" * 50_000],
)
def test_verify_refuses_manifests_that_are_none(bundle: Bundle, raw: bytes) -> None:
    (bundle.path / "manifest.json").write_bytes(raw)
    with pytest.raises(ManifestInvalid):
        verify.verify(bundle.path, service=SERVICE)


def test_verify_refuses_a_huge_manifest(bundle: Bundle) -> None:
    with open(bundle.path / "manifest.json", "ab") as file:
        file.truncate(5 * 1024 * 1024)
    with pytest.raises(SizeMismatch, match="manifest.json: found more than 4194304 bytes"):
        verify.verify(bundle.path, service=SERVICE)


@pytest.mark.parametrize("service", ["0.9", "2.0.0", "0.0.0+unknown"])
def test_verify_refuses_other_services(bundle: Bundle, service: str) -> None:
    with pytest.raises(ServiceMismatch, match="expected service >=1,<2"):
        verify.verify(bundle.path, service=service)


def test_verify_asks_for_a_signature_where_one_is_required(bundle: Bundle, keyring: Keyring) -> None:
    verify.verify(bundle.path, service=SERVICE)
    with pytest.raises(SignatureMissing):
        verify.verify(bundle.path, service=SERVICE, require_signature=True)
    with pytest.raises(SignatureMissing):
        verify.verify(bundle.path, service=SERVICE, keyring=keyring)


def test_verify_trusts_nobody_where_no_key_is_given(signed: Bundle) -> None:
    with pytest.raises(SignatureInvalid, match="the deployment gives none"):
        verify.verify(signed.path, service=SERVICE, require_signature=True)


def test_verify_refuses_other_keys(signed: Bundle) -> None:
    with pytest.raises(SignatureInvalid, match="unknown keys"):
        verify.verify(signed.path, service=SERVICE, keyring=Keyring.of(generate_key()[1]))


def test_verify_refuses_a_tampered_manifest_that_fits_its_files(signed: Bundle, keyring: Keyring) -> None:
    """Somebody who can write changes a file and everything about it, except the signature."""
    (signed.path / "rules.clock" / "rules.txt").write_bytes(b"evil")
    sha256 = hashlib.sha256(b"evil").hexdigest()

    def change(value: Any) -> None:
        rules = next(each for each in value["components"] if each["kind"] == "rules")
        rules["files"][0].update(size=4, sha256=sha256)
        rules["digest"] = hashlib.sha256(f"rules.txt 4 {sha256}\n".encode()).hexdigest()

    rewrite(signed, change)
    verify.verify(signed.path, service=SERVICE)  # without a keyring nothing tells
    with pytest.raises(SignatureInvalid, match="not over this manifest"):
        verify.verify(signed.path, service=SERVICE, keyring=keyring)


def test_verify_checks_the_signature_before_it_parses(
    signed: Bundle, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(raw: bytes) -> None:
        raise AssertionError("parsed what nobody vouches for")

    (signed.path / "manifest.json").write_bytes(b"{}")
    monkeypatch.setattr(verify, "parse", never)
    with pytest.raises(SignatureInvalid):
        verify.verify(signed.path, service=SERVICE, keyring=keyring)


def test_verify_refuses_mixed_fingerprints(bundle: Bundle) -> None:
    def change(value: Any) -> None:
        head = next(each for each in value["components"] if each["name"] == "intent")
        head["requires"]["vectorizer"] = "0" * 64

    rewrite(bundle, change)
    with pytest.raises(FingerprintMismatch) as caught:
        verify.verify(bundle.path, service=SERVICE)
    assert caught.value.part == "head.intent"
    assert caught.value.found == f"made with vectorizer {'0' * 64}"
    assert caught.value.expected == f"vectorizer {'f' * 64}, the bundle's"


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda path: (path / "manifest.json").write_bytes(b"{}"), ManifestInvalid),
        (lambda path: (path / "extra").mkdir(), FileUnexpected),
        (lambda path: (path / "head.intent" / "head.json").write_bytes(b""), SizeMismatch),
    ],
)
def test_verify_hashes_nothing_before_the_cheap_checks(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], object], error: type[StaticsError]
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("hashed a bundle that a look would have refused")

    monkeypatch.setattr(disk, "check_content", never)
    harm(bundle.path)
    with pytest.raises(error):
        verify.verify(bundle.path, service=SERVICE)


def test_verify_reads_signatures_with_a_limit(signed: Bundle, keyring: Keyring) -> None:
    (signed.path / "manifest.sig").write_bytes(b" " * (signing.SIGNATURE_LIMIT + 1))
    with pytest.raises(SizeMismatch, match="manifest.sig"):
        verify.verify(signed.path, service=SERVICE, keyring=keyring)


# Under a root, where bundles share components


@pytest.fixture
def shared(signed: Bundle, tmp_path: Path) -> Bundle:
    """The same bundle as a pull leaves it."""
    path = tmp_path / "root" / "bundles" / signed.digest
    path.mkdir(parents=True)
    for name in ("manifest.json", "manifest.sig"):
        shutil.copyfile(signed.path / name, path / name)
    for component in signed.manifest.components:
        shutil.copytree(signed.folder(component), tmp_path / "root" / "components" / component.digest)
    return Bundle(path, signed.manifest, signed.digest)


def folder_of(bundle: Bundle, name: str) -> Path:
    return bundle.folder(bundle.component("head", name))


def test_verify_finds_shared_components(shared: Bundle, keyring: Keyring) -> None:
    assert verify.verify(shared.path, service=SERVICE, keyring=keyring) == shared
    assert folder_of(shared, "intent").parent == shared.path.parent.parent / "components"


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda bundle: shutil.rmtree(folder_of(bundle, "intent")), FileMissing),
        (lambda bundle: (folder_of(bundle, "intent") / "extra").write_bytes(b""), FileUnexpected),
        (lambda bundle: (folder_of(bundle, "intent") / "head.json").write_bytes(b""), SizeMismatch),
        (lambda bundle: (folder_of(bundle, "intent") / "head.json").write_bytes(b"x" * 18), DigestMismatch),
        (lambda bundle: (bundle.path / "extra").write_bytes(b""), FileUnexpected),
        (
            lambda bundle: (bundle.path / "head.intent").mkdir(),
            FileMissing,
        ),  # a whole bundle, then, and not whole
        (
            lambda bundle: (folder_of(bundle, "intent") / "head.json").rename(
                folder_of(bundle, "intent") / "x"
            ),
            FileMissing,
        ),
    ],
)
def test_verify_refuses_shared_components_that_are_wrong(
    shared: Bundle, harm: Callable[[Bundle], object], error: type[StaticsError]
) -> None:
    harm(shared)
    with pytest.raises(error):
        verify.verify(shared.path, service=SERVICE)


def test_verify_refuses_a_shared_component_that_is_another(shared: Bundle) -> None:
    """Swapped for one that is whole in itself."""
    intent, emotion = folder_of(shared, "intent"), folder_of(shared, "emotion")
    shutil.rmtree(intent)
    shutil.copytree(emotion, intent)
    with pytest.raises(SizeMismatch, match="head.intent/head.json"):
        verify.verify(shared.path, service=SERVICE)


def test_verify_refuses_a_linked_shared_component(shared: Bundle) -> None:
    intent = folder_of(shared, "intent")
    outside = intent.rename(shared.path.parent / "outside")
    intent.symlink_to(outside)
    with pytest.raises(FileUnsafe, match="head.intent"):
        verify.verify(shared.path, service=SERVICE)


# Who vouches, and for how long


def test_verify_asks_for_as_many_signatures_as_it_is_told(
    make_bundle: Callable[..., Bundle], key: Ed25519PrivateKey
) -> None:
    bundle, second = make_bundle(signing_key=key), generate_key()[0]
    keyring = Keyring.of(key.public_key(), second.public_key())
    verify.verify(bundle.path, service=SERVICE, keyring=keyring)
    with pytest.raises(SignatureInvalid):
        verify.verify(bundle.path, service=SERVICE, keyring=keyring, signatures=2)
    raw, path = (bundle.path / "manifest.json").read_bytes(), bundle.path / "manifest.sig"
    path.write_bytes(signing.sign(raw, second, path.read_bytes()))
    verify.verify(bundle.path, service=SERVICE, keyring=keyring, signatures=2)


@pytest.mark.parametrize(
    ("late", "expired"),
    [
        (timedelta(days=-1), False),
        (timedelta(0), False),
        (timedelta(minutes=5), False),
        (timedelta(minutes=5, seconds=1), True),
        (timedelta(days=2), True),
    ],
)
def test_verify_judges_expiry_by_the_clock_it_is_given(
    make_bundle: Callable[..., Bundle], late: timedelta, expired: bool
) -> None:
    expires = datetime(2026, 5, 1, tzinfo=UTC)
    bundle = make_bundle(expires=expires)
    trust = verify.Trust(SERVICE, now=lambda: expires + late)
    verify.verify_bundle(bundle.path, trust)  # a bundle that serves goes on
    if not expired:
        verify.check_expiry(bundle.manifest, trust)
    else:
        with pytest.raises(Expired, match="expired at 2026-05-01T00:00:00Z"):
            verify.check_expiry(bundle.manifest, trust)
    verify.check_expiry(make_bundle().manifest, trust)  # one without a date never does


def test_verify_expiry_may_be_the_end_of_the_calendar(make_bundle: Callable[..., Bundle]) -> None:
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    verify.check_expiry(make_bundle(expires=last).manifest, verify.Trust(SERVICE))
