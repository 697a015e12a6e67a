"""The one table from a kind of head to the class that loads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from annotators.anchors import AnchorsHead
from annotators.boosted import BoostedHead
from annotators.context import ContextHead
from annotators.head import SPEC_FILE, HeadInvalid
from annotators.rules import RulesHead
from annotators.sentence import SentenceHead
from annotators.token import TokenHead

Head = SentenceHead | ContextHead | TokenHead | AnchorsHead | RulesHead | BoostedHead

KINDS: Mapping[str, Callable[[Path], Head]] = {
    "sentence": SentenceHead.load,
    "context": ContextHead.load,
    "token": TokenHead.load,
    "anchors": AnchorsHead.load,
    "rules": RulesHead.load,
    "boosted": BoostedHead.load,
}


def load(folder: Path) -> Head:
    """Load a head of any kind; raises HeadInvalid."""
    try:
        kind = json.loads((folder / SPEC_FILE).read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError) as error:
        raise HeadInvalid(
            folder.name, found=f"unreadable {SPEC_FILE} ({error})", expected="a head folder"
        ) from error
    if not isinstance(kind, str) or kind not in KINDS:
        raise HeadInvalid(
            folder.name,
            found=f"kind {kind!r}",
            expected=f"one of {', '.join(KINDS)}",
            remedy="use the code that made this head",
        )
    return KINDS[kind](folder)
