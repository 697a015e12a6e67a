"""The life of a head in bundles: added, replaced, removed; set behind a live head as its shadow, promoted, rolled back.

A bundle goes in and the next one comes out, the same but for the head in question, so that a pod pulls that head alone.
Before anything is at `out` the new bundle has been loaded as a pod loads it, with every check that a pod makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as changed
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nlu import loading
from nlu import parts as folders
from nlu.settings import Settings
from statics.bundle import Bundle, Part, build

# What a shadow provides that used to be live: the way back from the head that took its place, named by its digest.
ROLLBACK = "rollback"

Key = Ed25519PrivateKey | None


class Refused(ValueError):
    """A change that a bundle does not admit; says what was found, what was expected and what to do."""

    def __init__(self, part: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{part}: found {found}, expected {expected}; {remedy}")


def add(bundle: Bundle, folder: Path, out: Path, *, signing_key: Key = None) -> Bundle:
    """The next bundle, with one part more: a head, or any other kind of part.

    `folder` is the part's own, called <kind>.<name>, or holds exactly one head.<name>. Raises Refused, and whatever the
    doors of a bundle raise: StaticsError, EngineRefused, ValueError.
    """
    known, part = _parts(bundle), find(folder)
    if part.label in known:
        raise Refused(
            part.label,
            found="a part of this name in the bundle",
            expected="a new name",
            remedy="replace the part with `nlu heads replace`, or rename the new one",
        )
    return _next(bundle, {**known, part.label: part}, out, signing_key)


def replace(bundle: Bundle, folder: Path, out: Path, *, signing_key: Key = None) -> Bundle:
    """The next bundle, with another part in the place of its namesake; `folder` and errors are those of `add`."""
    known, part = _parts(bundle), find(folder)
    _named(known, part.label, remedy="add it with `nlu heads add`")
    return _next(bundle, {**known, part.label: part}, out, signing_key)


def remove(bundle: Bundle, name: str, out: Path, *, shadow: bool = False, signing_key: Key = None) -> Bundle:
    """The next bundle, without a head, or without the shadow of that name; other parts go by their folder's name."""
    known = _parts(bundle)
    label = f"shadow.{name}" if shadow else name if name in known else f"head.{name}"
    _named(known, label, remedy="name one of those")
    return _next(bundle, {each: part for each, part in known.items() if each != label}, out, signing_key)


def shadow(bundle: Bundle, folder: Path, out: Path, *, signing_key: Key = None) -> Bundle:
    """The next bundle, with a head as the shadow of the live head of its name, in the place of a candidate before it."""
    known, part = _parts(bundle), find(folder)
    _named(
        known,
        f"head.{part.name}",
        remedy="a shadow is compared with a live head; add one with `nlu heads add`",
    )
    if _is_way_back(bundle, known, part.name):
        raise Refused(
            f"shadow.{part.name}",
            found="the head that was live before, the way back from the promotion",
            expected="no shadow, or a candidate that was never live",
            remedy=f"give the way back up with `nlu heads remove {part.name} --shadow`",
        )
    candidate = changed(part, kind="shadow")
    return _next(bundle, {**known, candidate.label: candidate}, out, signing_key)


def promote(bundle: Bundle, name: str, out: Path, *, signing_key: Key = None) -> Bundle:
    """The next bundle, with live head and shadow in each other's place; the shadow then is the way back."""
    known = _parts(bundle)
    live, candidate = _pair(known, name)
    way_back = {ROLLBACK: bundle.component("shadow", name).digest}
    return _next(bundle, {**known, **_swapped(live, candidate, way_back)}, out, signing_key)


def rollback(bundle: Bundle, name: str, out: Path, *, signing_key: Key = None) -> Bundle:
    """The way back from `promote`: the head that was live before is live again, the promoted one a candidate."""
    known = _parts(bundle)
    live, candidate = _pair(known, name)
    if not _is_way_back(bundle, known, name):
        raise Refused(
            candidate.label,
            found="a head that was not live before this one",
            expected=f"the one that {live.label} took the place of",
            remedy=f"`nlu heads promote {name}` makes the shadow live, whatever it is",
        )
    return _next(bundle, {**known, **_swapped(live, candidate, {})}, out, signing_key)


def find(folder: Path) -> Part:
    """The part in a folder: the folder itself where it is called <kind>.<name>, else the one head.<name> in it."""
    here = folder.resolve()
    kind, _, name = here.name.partition(".")
    found = [here] if here.is_dir() and kind in folders.KINDS and name else sorted(here.glob("head.*/"))
    if len(found) != 1:
        raise Refused(
            str(folder),
            found=", ".join(each.name for each in found) or "no head",
            expected="a folder called head.NAME, or one that holds exactly one of them",
            remedy="name the head's own folder",
        )
    return folders.part(found[0])


def _parts(bundle: Bundle) -> dict[str, Part]:
    """Every part of a bundle as it is, by the name of its folder."""
    return {
        each.folder: Part(each.kind, each.name, bundle.folder(each), each.requires, each.provides)
        for each in bundle.manifest.components
    }


def _named(known: Mapping[str, Part], label: str, *, remedy: str) -> Part:
    if label not in known:
        kind = label.partition(".")[0]
        alike = ", ".join(each for each, part in known.items() if part.kind == kind)
        raise Refused(
            label, found=f"only {alike}" if alike else f"no {kind} at all", expected=label, remedy=remedy
        )
    return known[label]


def _pair(known: Mapping[str, Part], name: str) -> tuple[Part, Part]:
    candidate = _named(known, f"shadow.{name}", remedy="put one there with `nlu heads shadow`")
    return _named(known, f"head.{name}", remedy="add it with `nlu heads add`"), candidate


def _is_way_back(bundle: Bundle, known: Mapping[str, Part], name: str) -> bool:
    there = known.get(f"shadow.{name}")
    return there is not None and there.provides.get(ROLLBACK) == bundle.component("head", name).digest


def _swapped(live: Part, candidate: Part, provides: Mapping[str, str]) -> dict[str, Part]:
    return {
        live.label: changed(candidate, kind="head", provides={}),
        candidate.label: changed(live, kind="shadow", provides=provides),
    }


def _next(bundle: Bundle, parts: Mapping[str, Part], out: Path, signing_key: Key) -> Bundle:
    manifest = bundle.manifest
    return build(
        [*parts.values()],
        out,
        channel=manifest.channel,
        seq=manifest.seq + 1,
        expires=manifest.expires,
        requires_service=manifest.requires_service,
        signing_key=signing_key,
        check=lambda bundle: loading.load(bundle, milvus=Settings().milvus),
    )
