"""`Told`: what a build did with replies, line by line, for their author: merges.jsonl and blocked.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

MERGES_FILE = "merges.jsonl"
BLOCKED_FILE = "blocked.jsonl"


class Told:
    """Both files in the making, as a context; those of the build before stay unless `keep` was reached."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._merges, self._blocked = (
            self._part(name).open("w", encoding="utf-8") for name in (MERGES_FILE, BLOCKED_FILE)
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip
        self._merges.close()
        self._blocked.close()
        for name in (MERGES_FILE, BLOCKED_FILE):
            self._part(name).unlink(missing_ok=True)

    def merged(self, kept: str, into: str, text: str, why: str) -> None:
        """The reply `kept` says `into`, and now stands for `text` too."""
        line = {"id": kept, "kept": into, "merged": text, "why": why}
        self._merges.write(json.dumps(line, ensure_ascii=False) + "\n")

    def blocked(self, reply: str, text: str, why: str) -> None:
        """A reply that is in the index and is never said."""
        line = {"id": reply, "text": text, "why": why}
        self._blocked.write(json.dumps(line, ensure_ascii=False) + "\n")

    def keep(self) -> None:
        """Put both files in their places."""
        self._merges.flush()
        self._blocked.flush()
        for name in (MERGES_FILE, BLOCKED_FILE):
            self._part(name).replace(self._folder / name)

    def _part(self, name: str) -> Path:
        return self._folder / f".{name}.building-{os.getpid()}"
