"""Every wrong bundle is refused with a message of its own, naming what was found, what was expected and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nlu import loading, origin, parts
from nlu.errors import EngineRefused
from nlu.origin import find_bundle
from nlu.settings import Settings
from statics.bundle import Bundle, build
from statics.errors import StaticsError
from statics.manifest import Manifest, dump
from statics.signing import generate_key
from statics.verify import verify
from tests.tiny import CREATED, Made, make_parts

SERVICE = "0.1.0"


def rebuilt(folder: Path, out: Path) -> Bundle:
    """A bundle of whatever lies in a folder of parts."""
    return build(
        parts.collect(folder), out, channel="test", seq=1, created=CREATED, requires_service=">=0.1.0.dev0,<1"
    )


def loaded(path: Path, *, signed: bool = False) -> None:
    """What a server does with a bundle folder before it answers anybody."""
    loading.load(verify(path, service=SERVICE, require_signature=signed))


# Damage done to a finished bundle folder, and words its refusal must contain.


def _flip_a_byte(bundle: Path) -> None:
    model = bundle / "vectorizer.tiny" / "model.onnx"
    raw = bytearray(model.read_bytes())
    raw[len(raw) // 2] ^= 1
    model.write_bytes(raw)


def _remove_a_file(bundle: Path) -> None:
    (bundle / "head.intent" / "weights.safetensors").unlink()


def _add_a_file(bundle: Path) -> None:
    (bundle / "head.intent" / "more.bin").write_bytes(b"?")


def _link_a_file(bundle: Path) -> None:
    weights = bundle / "head.intent" / "weights.safetensors"
    weights.rename(bundle.parent / "elsewhere")
    weights.symlink_to(bundle.parent / "elsewhere")


def _truncate(bundle: Path) -> None:
    shard = next((bundle / "index.chitchat").glob("*.f16"))
    shard.write_bytes(shard.read_bytes()[:-2])


def _newer_format(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


def _newer_service(bundle: Path) -> None:
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_bytes(dump(manifest.model_copy(update={"requires_service": ">=7"})))


def _no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (_flip_a_byte, "digest-mismatch"),
    "missing file": (_remove_a_file, "file-missing"),
    "extra file": (_add_a_file, "file-unexpected"),
    "link": (_link_a_file, "file-unsafe"),
    "truncated shard": (_truncate, "size-mismatch"),
    "newer format": (_newer_format, "format-too-new"),
    "newer service wanted": (_newer_service, "service-mismatch"),
    "no manifest": (_no_manifest, "file-missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_loading_refuses_a_damaged_bundle(tiny: Made, tmp_path: Path, damage: str) -> None:
    harm, code = DAMAGES[damage]
    bundle = shutil.copytree(tiny.bundle.path, tmp_path / "bundle")
    loaded(bundle)  # unharmed it is fine
    harm(bundle)
    with pytest.raises(StaticsError) as refused:
        loaded(bundle)
    assert refused.value.code == code
    assert all(word in str(refused.value) for word in ("found", "expected", "remedy"))


def test_loading_refuses_an_unsigned_bundle_where_signing_is_required(tiny: Made, tmp_path: Path) -> None:
    with pytest.raises(StaticsError) as refused:
        loaded(tiny.bundle.path, signed=True)
    assert refused.value.code == "signature-missing"


def test_loading_accepts_a_signed_bundle_and_refuses_another_key(tiny: Made, tmp_path: Path) -> None:
    from statics.signing import Keyring, key_id

    (private, public), (_, other) = generate_key(), generate_key()
    bundle = build(
        parts.collect(tiny.parts),
        tmp_path / "b",
        requires_service=">=0.1.0.dev0",
        created=CREATED,
        signing_key=private,
    )
    verify(bundle.path, service=SERVICE, keyring=Keyring({key_id(public): public}), require_signature=True)
    with pytest.raises(StaticsError) as refused:
        verify(bundle.path, service=SERVICE, keyring=Keyring({key_id(other): other}), require_signature=True)
    assert refused.value.code == "signature-invalid"


def test_loading_refuses_a_head_of_another_vectorizer(tiny: Made, stranger: Made, tmp_path: Path) -> None:
    """At the door where bundles are built: the manifest's chain."""
    mixed = shutil.copytree(tiny.parts, tmp_path / "mixed")
    shutil.rmtree(mixed / "head.intent")
    shutil.copytree(stranger.parts / "head.intent", mixed / "head.intent")
    with pytest.raises(StaticsError) as refused:
        rebuilt(mixed, tmp_path / "bundle")
    assert refused.value.code == "fingerprint-mismatch"
    assert "head.intent" in str(refused.value)


def _forge_fingerprints(folder: Path, fingerprint: str, *, spec: bool) -> None:
    """Make a part claim another vectorizer in its canary file (and head.json), as a careless script might."""
    file = folder / "canaries.safetensors"
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        phrases = opened.metadata()["phrases"]
    save_file(load_file(file), file, metadata={"phrases": phrases, "vectorizer": fingerprint})
    if spec:
        head = json.loads((folder / "head.json").read_bytes())
        head["requires"]["vectorizer"] = fingerprint
        (folder / "head.json").write_text(json.dumps(head))


@pytest.mark.parametrize("part", ["head.intent", "index.chitchat"])
def test_loading_canaries_refuse_a_forged_fingerprint(
    tiny: Made, stranger: Made, tmp_path: Path, part: str
) -> None:
    fingerprint = tiny.bundle.of_kind("vectorizer")[0].provides["vectorizer"]
    mixed = shutil.copytree(tiny.parts, tmp_path / "mixed")
    shutil.rmtree(mixed / part)
    shutil.copytree(stranger.parts / part, mixed / part)
    _forge_fingerprints(mixed / part, fingerprint, spec=part.startswith("head"))
    bundle = rebuilt(mixed, tmp_path / "bundle")
    with pytest.raises(EngineRefused, match="canaries that moved"):
        loaded(bundle.path)


def test_loading_golden_phrases_refuse_a_head_with_forged_canaries(
    tiny: Made, stranger: Made, tmp_path: Path
) -> None:
    """The last door: a head whose every claim is forged still cannot answer its own phrases."""
    mixed = shutil.copytree(tiny.parts, tmp_path / "mixed")
    fingerprint = tiny.bundle.of_kind("vectorizer")[0].provides["vectorizer"]
    shutil.rmtree(mixed / "head.intent")
    shutil.copytree(stranger.parts / "head.intent", mixed / "head.intent")
    _forge_fingerprints(mixed / "head.intent", fingerprint, spec=True)
    shutil.copy(tiny.parts / "head.emotion" / "canaries.safetensors", mixed / "head.intent")
    bundle = rebuilt(mixed, tmp_path / "bundle")
    with pytest.raises(EngineRefused, match="head intent: found .* answered with"):
        loaded(bundle.path)


def test_loading_refuses_a_shard_of_another_width(tiny: Made, tmp_path: Path) -> None:
    """An index of a narrower vectorizer, its canaries replaced by the right ones."""
    narrow = make_parts(tmp_path / "narrow", seed=0, dim=6)
    mixed = shutil.copytree(tiny.parts, tmp_path / "mixed")
    shutil.rmtree(mixed / "index.chitchat")
    shutil.copytree(narrow / "index.chitchat", mixed / "index.chitchat")
    shutil.copy(tiny.parts / "head.intent" / "canaries.safetensors", mixed / "index.chitchat")
    bundle = rebuilt(mixed, tmp_path / "bundle")
    with pytest.raises(EngineRefused, match="index: found vectors 6 wide, expected 8"):
        loaded(bundle.path)


def test_loading_refuses_a_head_with_nan_weights(tiny: Made, tmp_path: Path) -> None:
    mixed = shutil.copytree(tiny.parts, tmp_path / "mixed")
    file = mixed / "head.intent" / "weights.safetensors"
    weights = load_file(file)
    weights["weight"][0, 0] = np.nan
    save_file(weights, file)
    bundle = rebuilt(mixed, tmp_path / "bundle")
    with pytest.raises(EngineRefused, match="NaN"):
        loaded(bundle.path)


def test_loading_refuses_a_bundle_without_a_vectorizer(tiny: Made, tmp_path: Path) -> None:
    lone = tmp_path / "parts"
    lone.mkdir()
    shutil.copytree(tiny.parts / "ranker.linear", lone / "ranker.linear") if (
        tiny.parts / "ranker.linear"
    ).exists() else (lone / "ranker.linear").mkdir()
    (lone / "ranker.linear" / "ranker.json").write_text("{}")
    bundle = rebuilt(lone, tmp_path / "bundle")
    with pytest.raises(EngineRefused, match="no vectorizer"):
        loaded(bundle.path)


def test_loading_messages_are_all_different(tiny: Made, tmp_path: Path) -> None:
    messages = set()
    for name, (harm, _) in DAMAGES.items():
        bundle = shutil.copytree(tiny.bundle.path, tmp_path / name.replace(" ", "-"))
        harm(bundle)
        with pytest.raises(StaticsError) as refused:
            loaded(bundle)
        messages.add(str(refused.value).replace(str(bundle), ""))
    assert len(messages) == len(DAMAGES)


def test_loading_reuses_what_did_not_change(tiny: Made, tmp_path: Path) -> None:
    """A sprint: one head differs; vectorizer, index, cold table and the other heads are taken over as they are."""
    before = loading.load(tiny.bundle)
    sprint = shutil.copytree(tiny.parts, tmp_path / "sprint")
    head = json.loads((sprint / "head.intent" / "head.json").read_bytes())
    (sprint / "head.intent" / "head.json").write_text(json.dumps(head | {"made_by": "the next sprint"}))
    after = loading.load(rebuilt(sprint, tmp_path / "bundle"), before=before)
    assert after.vectorizer is before.vectorizer
    assert after.replies is before.replies
    assert after.cold is before.cold
    assert after.fleet.heads["emotion"] is before.fleet.heads["emotion"]
    assert after.fleet.heads["intent"] is not before.fleet.heads["intent"]
    assert after.versions.bundle != before.versions.bundle


def test_loading_takes_no_part_for_one_of_another_kind(tiny: Made, tmp_path: Path) -> None:
    """The files of a head, called a ranker in the next bundle, have the same digest."""
    before = loading.load(tiny.bundle)
    head = tiny.bundle.component("head", "intent")
    ranker = head.model_copy(update={"kind": "ranker", "requires": {}})
    folder = Path(shutil.copytree(tiny.bundle.path, tmp_path / "bundle"))
    shutil.copytree(folder / head.folder, folder / ranker.folder)
    others = tuple(each for each in tiny.bundle.manifest.components if each.kind != "ranker")
    manifest = tiny.bundle.manifest.model_copy(update={"components": (*others, ranker)})
    with pytest.raises(EngineRefused, match="ranker: found"):
        loading.load(Bundle(folder, manifest, "0" * 64), before=before)


def test_find_bundle_asks_for_one_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "shipped_bundle", lambda: tmp_path / "absent")
    with pytest.raises(StaticsError, match="NLU_BUNDLE"):
        find_bundle(Settings(statics=tmp_path))
