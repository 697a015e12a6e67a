"""Bundles with one thing wrong: does any get past the checks, to a parser?

Each mutation is made in place, judged and undone: by `verify` on a bundle folder, and by `current` on a store of pulled
bundles, as a cold start would. The control leaves the digests unchecked: then spoilt bundles do load.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.chaos.section import Section
from benchmarks.chaos.toys import CHANNEL, Releases, Toy, make_toys
from benchmarks.result import at_least, at_most
from nlu import loading
from nlu.errors import NluError
from statics import signing
from statics import verify as verifying
from statics.bundle import Bundle
from statics.errors import StaticsError
from statics.pull import current, pull
from statics.signing import Keyring, generate_key
from statics.store import FolderStore
from statics.verify import Trust, verify
from statics.version import service_version

Undo = Callable[[], object]


@dataclass
class Victim:
    """A folder with a manifest, its signature and files somewhere below; `whole` says whether it is taken for good."""

    root: Path
    manifest: Path
    other: Path  # another bundle's folder, for mixing
    chance: random.Random

    @property
    def signature(self) -> Path:
        return self.manifest.with_suffix(".sig")

    def files(self) -> list[Path]:
        """Every file of a component."""
        return sorted(
            path for path in self.root.rglob("*") if path.is_file() and path.parent.name not in ("staging",)
            and path.name not in _NOT_PARTS and path != self.manifest and path != self.signature
        )  # fmt: skip


_NOT_PARTS = {"current.json", "state.json", "audit.jsonl", "pin.json", ".lock"}


def run(section: Section) -> None:
    """Try them all."""
    logging.getLogger("statics").setLevel(logging.CRITICAL)  # ten thousand refusals are the purpose
    work = section.rig.work
    toys = make_toys(work / "toys")
    releases = Releases(work / "releases", FolderStore(work / "store"))
    keyring = Keyring.load(releases.keyring)
    bundles = {toy.name: releases.make(toy) for toy in toys}
    flat = _Flat(bundles["a"].path, keyring)
    pulled = _Pulled(work / "root", releases, toys[0], keyring)
    chance = random.Random(7)
    count = section.scale(10_400, 600)  # some come out as nothing, and are not counted
    tried, loaded, reached, reasons = Counter[str](), Counter[str](), 0, Counter[str]()
    for target in (flat, pulled):
        victim = Victim(target.root, target.manifest, bundles["b"].path, chance)
        if not target.good():
            raise RuntimeError(f"{target.root}: refused before it was harmed")
        with mock.patch.object(loading, "load", side_effect=AssertionError("a parser was reached")) as parser:
            for kind, harm in _plan(victim, count // 2):
                undo = harm(victim)
                if undo is None:
                    continue
                tried[kind] += 1
                try:
                    loading.load(target.take())
                except AssertionError:
                    loaded[kind] += 1
                except StaticsError as error:
                    reasons[error.code] += 1
                undo()
            reached += parser.call_count
        if not target.good():
            raise RuntimeError(f"{target.root}: refused after every harm was undone")
        section.say(f"{sum(tried.values())} mutations")
    control = _control(flat, Victim(flat.root, flat.manifest, bundles["b"].path, chance))
    section.figures |= {"mutations": float(sum(tried.values())), "loaded": float(sum(loaded.values()))}
    section.figures |= {f"mutations_{kind}": float(number) for kind, number in sorted(tried.items())}
    section.figures |= {f"refused_{code}": float(number) for code, number in sorted(reasons.items())}
    section.figure("control_loaded_of_100_flips_with_digests_unchecked", control)
    section.bars += [
        at_least("mutations", sum(tried.values()), section.scale(10_000, 550)),
        at_most("corrupted bundles loaded", sum(loaded.values()), 0),
        at_most("times a parser was reached", reached, 0),
        at_least("control: flipped bundles that load with digests unchecked", control, 10),
    ]


class _Flat:
    """A bundle folder as it was built."""

    def __init__(self, root: Path, keyring: Keyring) -> None:
        self.root, self.manifest, self._keyring = root, root / "manifest.json", keyring

    def take(self) -> Bundle:
        return verify(self.root, service=service_version(), keyring=self._keyring, require_signature=True)

    def good(self) -> bool:
        return bool(self.take().digest)


class _Pulled:
    """What a pull left, as a cold start without a store finds it."""

    def __init__(self, root: Path, releases: Releases, toy: Toy, keyring: Keyring) -> None:
        self.root, self._keyring = root, keyring
        releases.release(toy)
        bundle = pull(
            releases.store,
            root,
            channel=CHANNEL,
            service=service_version(),
            keyring=keyring,
            require_signature=True,
        )
        self.manifest = bundle.path / "manifest.json"

    def take(self) -> Bundle:
        found = current(self.root, trust=Trust(service_version(), self._keyring, require_signature=True))
        if found is None:
            raise _Nothing(
                part=str(self.root), found="nothing whole", expected="a bundle", remedy="pull again"
            )
        return found

    def good(self) -> bool:
        return bool(self.take().digest)


class _Nothing(StaticsError):
    code = "nothing-whole"


def _plan(victim: Victim, count: int) -> Iterator[tuple[str, Callable[[Victim], Undo | None]]]:
    """Every header byte of every file once, as far as they go into a third of the count; then all kinds in turn."""
    heads = [(path, at) for path in victim.files() for at in range(min(64, path.stat().st_size))]
    victim.chance.shuffle(heads)
    for path, at in heads[: count // 3]:
        yield "header", lambda _, path=path, at=at: _flip(path, at, 1 << victim.chance.randrange(8))  # type: ignore[misc]
    kinds = list(_HARMS.items())
    for i in range(count - min(len(heads), count // 3)):
        yield kinds[i % len(kinds)]


def _control(flat: _Flat, victim: Victim) -> int:
    """How many of 100 bundles with one bit of a weight or a vector flipped load when no digest is looked at."""
    loaded = 0
    binary = [
        path for path in victim.files() if path.suffix in (".safetensors", ".f16", ".onnx", ".bin", ".npy")
    ]
    with mock.patch.object(verifying, "check_files", lambda *_, **__: None):
        for _ in range(100):
            path = victim.chance.choice(binary)
            undo = _flip(path, victim.chance.randrange(path.stat().st_size // 2, path.stat().st_size), 1)
            try:
                loading.load(flat.take())
                loaded += 1
            except (NluError, ValueError):
                pass
            undo()
    return loaded


def _flip(path: Path, at: int, bit: int) -> Undo:
    raw = path.read_bytes()
    return _write(path, raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])


def _write(path: Path, raw: bytes) -> Undo:
    before = path.read_bytes()
    path.write_bytes(raw)

    def undo() -> None:
        path.write_bytes(before)

    return undo


def _any(victim: Victim) -> Path:
    return victim.chance.choice(victim.files())


def _bit(victim: Victim) -> Undo | None:
    path = _any(victim)
    size = path.stat().st_size
    return _flip(path, victim.chance.randrange(size), 1 << victim.chance.randrange(8)) if size else None


def _truncate(victim: Victim) -> Undo | None:
    path = _any(victim)
    raw = path.read_bytes()
    return _write(path, raw[: victim.chance.randrange(len(raw))]) if raw else None


def _append(victim: Victim) -> Undo | None:
    path = _any(victim)
    return _write(path, path.read_bytes() + victim.chance.randbytes(victim.chance.randint(1, 64)))


def _overwrite(victim: Victim) -> Undo | None:
    path = _any(victim)
    raw = bytearray(path.read_bytes())
    if not raw:
        return None
    begin = victim.chance.randrange(len(raw))
    noise = victim.chance.randbytes(min(len(raw) - begin, victim.chance.randint(1, 4096)))
    changed = bytes(raw[:begin]) + noise + bytes(raw[begin + len(noise) :])
    return _write(path, changed) if changed != bytes(raw) else None


def _swap(victim: Victim) -> Undo | None:
    one, two = _any(victim), _any(victim)
    a, b = one.read_bytes(), two.read_bytes()
    if a == b:
        return None
    undo_one, undo_two = _write(one, b), _write(two, a)
    return lambda: (undo_one(), undo_two())


def _rename(victim: Victim) -> Undo | None:
    path = _any(victim)
    new = path.with_name(victim.chance.choice(("x", path.name + "x", path.name.upper(), "." + path.name)))
    path.rename(new)
    return lambda: new.rename(path)


def _remove(victim: Victim) -> Undo | None:
    path = _any(victim)
    raw = path.read_bytes()
    path.unlink()
    return lambda: path.write_bytes(raw)


def _extra(victim: Victim) -> Undo | None:
    new = _any(victim).parent / victim.chance.choice(("extra", "model.onnx.data", "weights.pkl", ".hidden"))
    if new.exists():
        return None
    new.write_bytes(b"extra")
    return new.unlink


def _link(victim: Victim) -> Undo | None:
    path = _any(victim)
    raw = path.read_bytes()
    away = victim.root.parent / "linked"
    away.write_bytes(raw)
    path.unlink()
    path.symlink_to(away) if victim.chance.random() < 0.5 else path.hardlink_to(away)

    def undo() -> None:
        path.unlink()
        away.unlink()
        path.write_bytes(raw)

    return undo


def _foreign_part(victim: Victim) -> Undo | None:
    """A component of another bundle in the place of ours."""
    path = _any(victim)
    theirs = [file for file in victim.other.rglob(path.name) if file.read_bytes() != path.read_bytes()]
    return _write(path, victim.chance.choice(theirs).read_bytes()) if theirs else None


def _manifest_bit(victim: Victim) -> Undo | None:
    size = victim.manifest.stat().st_size
    return _flip(victim.manifest, victim.chance.randrange(size), 1 << victim.chance.randrange(8))


def _manifest_edit(victim: Victim) -> Undo | None:
    """A well-formed manifest that says something else, under the old signature."""
    value = json.loads(victim.manifest.read_bytes())
    edit = victim.chance.randrange(5)
    if edit == 0:
        value["seq"] += victim.chance.choice((-1, 1, 1000))
    elif edit == 1:
        value["components"].pop(victim.chance.randrange(len(value["components"])))
    elif edit == 2:
        file = victim.chance.choice(victim.chance.choice(value["components"])["files"])
        file["sha256"] = victim.chance.randbytes(32).hex()
    elif edit == 3:
        value["requires_service"] = ">=0"
    else:
        value["channel"] = "other"
    return _write(victim.manifest, json.dumps(value, sort_keys=True, indent=1).encode() + b"\n")


def _stranger_signs(victim: Victim) -> Undo | None:
    return _write(victim.signature, signing.sign(victim.manifest.read_bytes(), generate_key()[0]))


def _signature_bit(victim: Victim) -> Undo | None:
    size = victim.signature.stat().st_size
    return _flip(victim.signature, victim.chance.randrange(size), 1 << victim.chance.randrange(8))


def _signature_gone(victim: Victim) -> Undo | None:
    raw = victim.signature.read_bytes()
    victim.signature.unlink()
    return lambda: victim.signature.write_bytes(raw)


def _foreign_manifest(victim: Victim) -> Undo | None:
    """A manifest of ours, rightly signed, over files that are not its own."""
    one = _write(victim.manifest, (victim.other / "manifest.json").read_bytes())
    two = _write(victim.signature, (victim.other / "manifest.sig").read_bytes())
    return lambda: (one(), two())


_HARMS: dict[str, Callable[[Victim], Undo | None]] = {
    "bit": _bit,
    "truncated": _truncate,
    "appended": _append,
    "overwritten": _overwrite,
    "swapped": _swap,
    "renamed": _rename,
    "removed": _remove,
    "extra": _extra,
    "linked": _link,
    "foreign-part": _foreign_part,
    "manifest-bit": _manifest_bit,
    "manifest-edit": _manifest_edit,
    "stranger-signs": _stranger_signs,
    "signature-bit": _signature_bit,
    "signature-gone": _signature_gone,
    "foreign-manifest": _foreign_manifest,
}
