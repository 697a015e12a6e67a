"""nlu.heads.lifecycle: a bundle goes in, the next comes out; one head differs, or nothing comes out at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nlu import loading, parts
from nlu.canaries import FILE as CANARIES
from nlu.errors import EngineRefused
from nlu.heads import lifecycle
from nlu.heads.lifecycle import Refused
from nlu.ranker import Ranker
from statics.bundle import Bundle, build, diff
from statics.errors import FingerprintMismatch
from statics.signing import Keyring, generate_key, key_id
from statics.verify import verify
from tests.tiny import CREATED, Made

SERVICE = "0.1.0"
HEADS = {"emotion", "followup", "intent", "quick", "slots", "topic"}


def edited(head: Path, **fields: Any) -> Path:
    """A head folder, with fields of its head.json replaced."""
    spec = json.loads((head / "head.json").read_bytes())
    (head / "head.json").write_text(json.dumps(spec | fields))
    return head


def another(made: Made, folder: Path, name: str = "intent", made_by: str = "the next sprint") -> Path:
    """A head of a tiny bundle as the next sprint trains it: the same answers, other bytes."""
    return edited(
        Path(shutil.copytree(made.parts / f"head.{name}", folder / f"head.{name}")), made_by=made_by
    )


def digests(bundle: Bundle) -> dict[str, str]:
    return {component.folder: component.digest for component in bundle.manifest.components}


def differing(old: Bundle, new: Bundle) -> dict[str, str]:
    """What is not the same, and how; whatever is the same has the same bytes on the disk."""
    changes = diff(old.manifest, new.manifest)
    for change in changes:
        if change.what == "same" and change.new is not None:
            for file in change.new.files:
                before = (old.path / change.folder / file.name).read_bytes()
                assert (new.path / change.folder / file.name).read_bytes() == before
    return {change.folder: change.what for change in changes if change.what != "same"}


def to_pull(old: Bundle, new: Bundle) -> int:
    return sum(change.bytes_to_pull for change in diff(old.manifest, new.manifest))


def size(head: Path) -> int:
    """What a pod pulls of a head of a vectorizer it has parts of: all but the canaries that these share."""
    return sum(file.stat().st_size for file in head.iterdir() if file.name != CANARIES)


def test_lifecycle_replace_changes_one_head_alone(tiny: Made, tmp_path: Path) -> None:
    head = another(tiny, tmp_path)
    new = lifecycle.replace(tiny.bundle, head, tmp_path / "new")
    assert verify(new.path, service=SERVICE) == new
    assert differing(tiny.bundle, new) == {"head.intent": "changed"}
    assert to_pull(tiny.bundle, new) == (head / "head.json").stat().st_size  # the weights stayed
    assert loading.load(new).fleet.names == loading.load(tiny.bundle).fleet.names


def test_lifecycle_remove_and_add_come_back_to_the_same_parts(tiny: Made, tmp_path: Path) -> None:
    less = lifecycle.remove(tiny.bundle, "topic", tmp_path / "less")
    assert differing(tiny.bundle, less) == {"head.topic": "removed"}
    assert to_pull(tiny.bundle, less) == 0
    again = lifecycle.add(less, tiny.parts / "head.topic", tmp_path / "again")
    assert differing(less, again) == {"head.topic": "added"}
    assert to_pull(less, again) == size(tiny.parts / "head.topic")
    assert again.manifest.components == tiny.bundle.manifest.components


def test_lifecycle_keeps_what_the_manifest_says_and_counts_on(tiny: Made, tmp_path: Path) -> None:
    old = build(
        parts.collect(tiny.parts), tmp_path / "old", channel="canary", seq=41, created=CREATED,
        expires=datetime(2999, 1, 1, tzinfo=UTC), requires_service=">=0.1.0.dev0,<0.9",
    )  # fmt: skip
    new = lifecycle.remove(old, "topic", tmp_path / "new").manifest
    assert (new.seq, new.channel, new.requires_service) == (42, "canary", ">=0.1.0.dev0,<0.9")
    assert new.expires == old.manifest.expires
    assert new.created > old.manifest.created


def test_lifecycle_out_may_be_the_bundle_itself(tiny: Made, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny.bundle.path, tmp_path / "bundle"))
    old = verify(path, service=SERVICE)
    new = lifecycle.replace(old, another(tiny, tmp_path), path)
    assert verify(path, service=SERVICE) == new
    assert new.manifest.seq == old.manifest.seq + 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bundle", "head.intent"]


def test_lifecycle_signs_with_the_key_that_is_given(tiny: Made, tmp_path: Path) -> None:
    private, public = generate_key()
    lifecycle.replace(tiny.bundle, another(tiny, tmp_path), tmp_path / "signed", signing_key=private)
    verify(
        tmp_path / "signed",
        service=SERVICE,
        keyring=Keyring({key_id(public): public}),
        require_signature=True,
    )


def test_lifecycle_takes_the_one_head_in_a_folder(tiny: Made, tmp_path: Path) -> None:
    run = tmp_path / "run"
    head = another(tiny, run)
    (run / "report.html").write_text("what a training leaves beside its head")
    (run / "head.notes").write_text("a file is no head")
    assert lifecycle.find(run) == lifecycle.find(head)
    another(tiny, run, "emotion")
    with pytest.raises(Refused, match="found head.emotion, head.intent, expected .* exactly one"):
        lifecycle.find(run)


@pytest.mark.parametrize("name", ["nowhere", "empty", "head.nowhere"])
def test_lifecycle_says_where_there_is_no_head(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=f"{name}: found no head, expected a folder called head.NAME"):
        lifecycle.find(tmp_path / name)


def test_lifecycle_add_refuses_a_name_that_is_there(tiny: Made, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="head.intent: found a part of this name.*nlu heads replace"):
        lifecycle.add(tiny.bundle, another(tiny, tmp_path), tmp_path / "new")


def test_lifecycle_replace_and_remove_name_the_heads_there_are(tiny: Made, tmp_path: Path) -> None:
    stranger = another(tiny, tmp_path).rename(tmp_path / "head.mood")
    edited(stranger, name="mood")
    there = r"head\.mood: found only " + ", ".join(rf"head\.{name}" for name in sorted(HEADS))
    with pytest.raises(Refused, match=there):
        lifecycle.replace(tiny.bundle, stranger, tmp_path / "new")
    with pytest.raises(Refused, match=there):
        lifecycle.remove(tiny.bundle, "mood", tmp_path / "new")
    with pytest.raises(Refused, match="shadow.intent: found no shadow at all"):
        lifecycle.remove(tiny.bundle, "intent", tmp_path / "new", shadow=True)


# Harm done to a head folder, the error it must meet, and words of it.
def _other_vectorizer(head: Path, stranger: Path) -> None:
    shutil.rmtree(head)
    shutil.copytree(stranger, head)


def _other_vectorizer_with_forged_canaries(head: Path, stranger: Path) -> None:
    canaries = (head / CANARIES).read_bytes()
    _other_vectorizer(head, stranger)
    (head / CANARIES).write_bytes(canaries)


def _fewer_weights_than_labels(head: Path, stranger: Path) -> None:
    weights = load_file(head / "weights.safetensors")
    save_file({name: tensor[:-1].copy() for name, tensor in weights.items()}, head / "weights.safetensors")


def _nan(head: Path, stranger: Path) -> None:
    weights = load_file(head / "weights.safetensors")
    weights["weight"][0, 0] = np.nan
    save_file(weights, head / "weights.safetensors")


def _twice_the_same_label(head: Path, stranger: Path) -> None:
    labels = json.loads((head / "head.json").read_bytes())["labels"]
    edited(head, labels=[labels[0], *labels[:-1]])


def _unknown_kind(head: Path, stranger: Path) -> None:
    edited(head, kind="oracle")


def _other_name(head: Path, stranger: Path) -> None:
    edited(head, name="purpose")


def _no_head(head: Path, stranger: Path) -> None:
    (head / "head.json").unlink()


def _no_canaries(head: Path, stranger: Path) -> None:
    (head / CANARIES).unlink()


def _wrong_golden(head: Path, stranger: Path) -> None:
    golden = json.loads((head / "head.json").read_bytes())["golden"]
    edited(head, golden=[golden[0] | {"label": "nobody says this"}])


HARM: list[tuple[Callable[[Path, Path], None], type[Exception], str]] = [
    (_other_vectorizer, FingerprintMismatch, "intent: found made with vectorizer .* expected vectorizer"),
    (_other_vectorizer_with_forged_canaries, EngineRefused, "found trained on vectorizer .* retrain"),
    (_fewer_weights_than_labels, EngineRefused, "found tensor .* of shape 2.*, expected 3"),
    (_nan, EngineRefused, "found NaN or infinite .* expected finite weights"),
    (_twice_the_same_label, EngineRefused, "labels must be distinct"),
    (_unknown_kind, EngineRefused, "found kind 'oracle', expected one of sentence, .* use the code"),
    (_other_name, EngineRefused, "intent: found a head named purpose, expected intent; call the folder"),
    (_no_head, EngineRefused, "found unreadable head.json .* expected a head folder"),
    (_no_canaries, ValueError, "found no canaries.safetensors, expected .* build the part again"),
    (_wrong_golden, EngineRefused, "answered with .* expected nobody says this; .* retrain it"),
]


@pytest.mark.parametrize(("harm", "error", "words"), HARM, ids=[harm.__name__ for harm, _, _ in HARM])
@pytest.mark.parametrize("change", [lifecycle.replace, lifecycle.shadow])
def test_lifecycle_refuses_before_anything_is_written(
    tiny: Made,
    stranger: Made,
    tmp_path: Path,
    change: Callable[[Bundle, Path, Path], Bundle],
    harm: Callable[[Path, Path], None],
    error: type[Exception],
    words: str,
) -> None:
    head = another(tiny, tmp_path)
    path = Path(shutil.copytree(tiny.bundle.path, tmp_path / "bundle"))
    harm(head, stranger.parts / "head.intent")
    for out in (tmp_path / "new", path):
        with pytest.raises(error, match=words):
            change(tiny.bundle, head, out)
    assert verify(path, service=SERVICE).digest == tiny.bundle.digest
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bundle", "head.intent"]


def test_lifecycle_moves_other_parts_by_their_folders_name(tiny: Made, tmp_path: Path) -> None:
    ranker = tmp_path / "ranker.linear"
    Ranker.linear({"similarity": 0.5}).save(ranker)
    more = lifecycle.add(tiny.bundle, ranker, tmp_path / "more")
    assert differing(tiny.bundle, more) == {"ranker.linear": "added"}
    less = lifecycle.remove(more, "ranker.linear", tmp_path / "less")
    assert digests(less) == digests(tiny.bundle)


def test_lifecycle_refuses_a_second_vectorizer_and_the_loss_of_the_only_one(
    tiny: Made, tmp_path: Path
) -> None:
    second = shutil.copytree(tiny.parts / "vectorizer.tiny", tmp_path / "vectorizer.second")
    with pytest.raises(FingerprintMismatch, match="found 2 vectorizers"):
        lifecycle.add(tiny.bundle, Path(second), tmp_path / "new")
    with pytest.raises(FingerprintMismatch, match="expected a vectorizer in the bundle"):
        lifecycle.remove(tiny.bundle, "vectorizer.tiny", tmp_path / "new")


def test_lifecycle_shadow_stands_behind_the_live_head(tiny: Made, tmp_path: Path) -> None:
    head = another(tiny, tmp_path)
    new = lifecycle.shadow(tiny.bundle, head, tmp_path / "new")
    assert differing(tiny.bundle, new) == {"shadow.intent": "added"}
    assert to_pull(tiny.bundle, new) == (head / "head.json").stat().st_size
    assert set(loading.load(new).fleet.shadows) == {"intent"}
    gone = lifecycle.remove(new, "intent", tmp_path / "gone", shadow=True)
    assert digests(gone) == digests(tiny.bundle)


def test_lifecycle_shadow_needs_a_live_head(tiny: Made, tmp_path: Path) -> None:
    less = lifecycle.remove(tiny.bundle, "intent", tmp_path / "less")
    with pytest.raises(Refused, match="head.intent: found only .*nlu heads add"):
        lifecycle.shadow(less, another(tiny, tmp_path), tmp_path / "new")
    shadowed = lifecycle.shadow(tiny.bundle, another(tiny, tmp_path / "sprint"), tmp_path / "shadowed")
    with pytest.raises(ValueError, match="intent: found a shadow without a live head of its name"):
        lifecycle.remove(shadowed, "intent", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_lifecycle_shadow_takes_the_place_of_an_earlier_candidate(tiny: Made, tmp_path: Path) -> None:
    one = lifecycle.shadow(tiny.bundle, another(tiny, tmp_path / "1"), tmp_path / "one")
    two = lifecycle.shadow(one, another(tiny, tmp_path / "2", made_by="sprint 2"), tmp_path / "two")
    assert differing(one, two) == {"shadow.intent": "changed"}


def test_lifecycle_promote_swaps_and_rollback_swaps_back(tiny: Made, tmp_path: Path) -> None:
    shadowed = lifecycle.shadow(tiny.bundle, another(tiny, tmp_path), tmp_path / "shadowed")
    live, candidate = digests(shadowed)["head.intent"], digests(shadowed)["shadow.intent"]
    promoted = lifecycle.promote(shadowed, "intent", tmp_path / "promoted")
    assert differing(shadowed, promoted) == {"head.intent": "changed", "shadow.intent": "changed"}
    assert (digests(promoted)["head.intent"], digests(promoted)["shadow.intent"]) == (candidate, live)
    assert to_pull(shadowed, promoted) == 0
    back = lifecycle.rollback(promoted, "intent", tmp_path / "back")
    assert back.manifest.components == shadowed.manifest.components
    assert back.manifest.seq == shadowed.manifest.seq + 2
    assert to_pull(promoted, back) == 0


def test_lifecycle_rollback_is_only_to_the_head_that_was_live_before(tiny: Made, tmp_path: Path) -> None:
    shadowed = lifecycle.shadow(tiny.bundle, another(tiny, tmp_path / "1"), tmp_path / "shadowed")
    promoted = lifecycle.promote(shadowed, "intent", tmp_path / "promoted")
    third = another(tiny, tmp_path / "3", made_by="sprint 3")
    never_live = r"shadow.intent: found a head that was not live before this one.*nlu heads promote intent"
    with pytest.raises(Refused, match="shadow.intent: found no shadow at all.*nlu heads shadow"):
        lifecycle.rollback(tiny.bundle, "intent", tmp_path / "new")
    with pytest.raises(Refused, match=never_live):
        lifecycle.rollback(shadowed, "intent", tmp_path / "new")
    with pytest.raises(Refused, match=never_live):  # not again, either: after it, the shadow is a candidate
        lifecycle.rollback(
            lifecycle.rollback(promoted, "intent", tmp_path / "back"), "intent", tmp_path / "new"
        )
    with pytest.raises(Refused, match=never_live):  # what was live before the third head is not in the shadow
        lifecycle.rollback(
            lifecycle.replace(promoted, third, tmp_path / "replaced"), "intent", tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_lifecycle_way_back_is_not_lost_by_the_way(tiny: Made, tmp_path: Path) -> None:
    shadowed = lifecycle.shadow(tiny.bundle, another(tiny, tmp_path / "1"), tmp_path / "shadowed")
    promoted = lifecycle.promote(shadowed, "intent", tmp_path / "promoted")
    third = another(tiny, tmp_path / "3", made_by="sprint 3")
    with pytest.raises(
        Refused, match="found the head that was live before.*nlu heads remove intent --shadow"
    ):
        lifecycle.shadow(promoted, third, tmp_path / "new")
    given_up = lifecycle.remove(promoted, "intent", tmp_path / "given-up", shadow=True)
    assert digests(lifecycle.shadow(given_up, third, tmp_path / "new"))["shadow.intent"]
