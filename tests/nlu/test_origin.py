"""nlu.origin: which bundle is taken, by what was named."""

from __future__ import annotations

import base64
import json
import logging
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nlu import origin
from nlu.settings import Settings
from statics.errors import FileUnsafe, NotFound, SignatureMissing
from statics.local import pin
from statics.publish import publish
from statics.signing import generate_key, key_id
from statics.store import FolderStore
from tests.tiny import Made


@pytest.fixture
def shipped(tiny: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle in the place of the shipped one, and none of the variables of whoever runs the tests."""
    for name in ("NLU_BUNDLE", "NLU_STORE", "NLU_STATICS", "NLU_KEYRING", "NLU_REQUIRE_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    folder = shutil.copytree(tiny.bundle.path, tmp_path / "shipped")
    monkeypatch.setattr(origin, "shipped_bundle", lambda: folder)
    return folder


def test_origin_takes_the_shipped_bundle_where_nothing_is_named(
    shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nlu.origin"):
        assert origin.find_bundle(Settings()).path == shipped
    assert str(shipped) in caplog.text and "shipped" in caplog.text


def test_origin_takes_a_named_bundle_first_and_a_store_second(
    shipped: Path, tiny: Made, stranger: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(stranger.bundle, FolderStore(tmp_path / "store"), channel="test")
    stored = Settings(store=str(tmp_path / "store"), channel="test", statics=tmp_path / "pod")
    with caplog.at_level(logging.INFO, logger="nlu.origin"):
        assert origin.find_bundle(stored).digest == stranger.bundle.digest
        both = stored.model_copy(update={"bundle": tiny.bundle.path})
        assert origin.find_bundle(both).path == tiny.bundle.path
    assert "shipped" not in caplog.text


def test_origin_does_not_fall_back_to_the_shipped_bundle_from_a_store_that_fails(
    shipped: Path, tmp_path: Path
) -> None:
    """Whoever named a store wants what is there, not an example."""
    with pytest.raises(NotFound):
        origin.find_bundle(Settings(store=str(tmp_path / "nowhere"), statics=tmp_path / "pod"))


def test_origin_without_any_bundle_says_what_to_do(shipped: Path) -> None:
    shutil.rmtree(shipped)
    with pytest.raises(NotFound, match=r"NLU_BUNDLE.*NLU_STORE.*make starter"):
        origin.find_bundle(Settings())


def test_origin_holds_the_shipped_bundle_to_required_signatures(shipped: Path, tmp_path: Path) -> None:
    keyring = tmp_path / "trusted.json"
    _, public = generate_key()
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    keyring.write_text(json.dumps({key_id(public): base64.b64encode(raw).decode()}))
    with pytest.raises(SignatureMissing):
        origin.find_bundle(Settings(keyring=keyring, require_signature=True))


def test_origin_takes_a_shipped_bundle_that_an_installer_linked_and_no_other(
    shipped: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(path for path in shipped.rglob("*") if path.is_file())):
        (tmp_path / f"cache-{number}").hardlink_to(path)
    assert origin.find_bundle(Settings()).path == shipped
    with pytest.raises(FileUnsafe):
        origin.find_bundle(Settings(bundle=shipped))


def test_origin_knows_what_should_serve_without_pulling_it(
    tiny: Made, stranger: Made, tmp_path: Path
) -> None:
    settings = Settings(store=str(tmp_path / "store"), channel="test", statics=tmp_path / "pod")
    publish(tiny.bundle, FolderStore(tmp_path / "store"))
    assert origin.wanted(settings) == tiny.bundle.digest
    assert not (tmp_path / "pod").exists()
    pin(tmp_path / "pod", stranger.bundle.digest)
    assert origin.wanted(settings) == stranger.bundle.digest
    assert origin.wanted(settings.model_copy(update={"pin": "0" * 64})) == "0" * 64


def test_origin_release_becomes_current_only_when_it_is_followed(tiny: Made, tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path / "store"), channel="test", statics=tmp_path / "pod")
    publish(tiny.bundle, FolderStore(tmp_path / "store"))
    assert origin.fetch_release(settings).bundle.digest == tiny.bundle.digest
    assert origin.last_good(settings) is None
    assert origin.find_bundle(settings).digest == tiny.bundle.digest
    found = origin.last_good(settings)
    assert found is not None and found.digest == tiny.bundle.digest
