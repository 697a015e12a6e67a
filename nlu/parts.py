"""From folders to the parts of a bundle: what each provides and requires is read off the folder itself."""

from __future__ import annotations

from pathlib import Path

from nlu import canaries
from nlu.ranker import MODEL_FILE
from nlu.vectorizer import fingerprint
from statics.bundle import Part

KINDS = ("vectorizer", "head", "index", "cold", "ranker", "shadow", "adapter", "routes")


def collect(folder: Path) -> list[Part]:
    """Every `<kind>.<name>` subfolder as a Part, in the order of KINDS; raises ValueError for one that is neither."""
    parts = [part(child) for child in sorted(folder.iterdir()) if child.is_dir()]
    if not parts:
        raise ValueError(
            f"{folder}: found no parts, expected subfolders such as vectorizer.main and head.intent"
        )
    return sorted(parts, key=lambda part: (KINDS.index(part.kind), part.name))


def part(folder: Path) -> Part:
    """One folder as a Part; raises ValueError."""
    kind, _, name = folder.name.partition(".")
    if kind not in KINDS or not name:
        raise ValueError(
            f"{folder}: found a folder of this name, expected <kind>.<name> with a kind of {', '.join(KINDS)}"
        )
    if kind == "vectorizer":
        return Part(kind, name, folder, provides={"vectorizer": fingerprint(folder)})
    made_for = canaries.made_for(folder)
    by_hand = kind == "routes" or (kind == "ranker" and not (folder / MODEL_FILE).exists())
    if made_for is None and not by_hand:
        raise ValueError(
            f"{folder}: found no {canaries.FILE}, expected the canaries of its vectorizer; build the part again"
        )
    return Part(kind, name, folder, requires={} if made_for is None else {"vectorizer": made_for})
