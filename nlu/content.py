"""The authored starter content (statics/starter), parsed: phrases with inline slots, dialogs, replies, promotions.

Formats are plain on purpose, so that anybody can add a phrase: `## label` opens a label, `[half past six](time)` marks a
slot, `#` comments a line out; two-turn contexts are TSV; replies and promotions are TOML.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from nlu.types import Turn

_MARK = re.compile(r"\[([^\[\]]+)\]\(([a-z_]+)\)")
_HELD_OUT_PERCENT = 20


_GROUP: dict[str, type] = {
    "topic": str,
    "emotion": str,
    "prompts": list,
    "any": list,
    "calm": list,
    "lively": list,
}
_PROMOTION: dict[str, type] = {
    "id": str, "prompts": list, "reply": str, "persona": str, "surface": str, "valid_from": datetime, "valid_until": datetime,
}  # fmt: skip


class ContentInvalid(ValueError):
    """A line of content that does not parse; names file and line."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A marked stretch of a phrase, in code points, end exclusive."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled phrase. `group` is the file's stem, for intents their domain."""

    text: str
    label: str
    group: str = ""
    slots: tuple[Slot, ...] = ()
    context: tuple[Turn, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether this example belongs to the dev split: decided by its own text, so that adding phrases moves no other."""
        said = "\n".join([*(turn.text for turn in self.context), self.text])
        return hashlib.sha256(said.encode()).digest()[0] * 100 < _HELD_OUT_PERCENT * 256


@dataclass(frozen=True, slots=True)
class ReplyLine:
    """One reply with the prompts it answers; empty persona or surface = everyone, everywhere."""

    id: str
    text: str
    prompts: tuple[str, ...]
    persona: str = ""
    surface: str = ""
    emotion: str = ""
    topic: str = ""
    group: str = ""  # the file's stem
    valid_from: datetime | None = None
    valid_until: datetime | None = None


@dataclass(frozen=True)
class Content:
    """Everything under statics/starter."""

    intents: tuple[Example, ...]
    out_of_scope: tuple[Example, ...]
    emotions: tuple[Example, ...]
    toxicity: tuple[Example, ...]
    contexts: tuple[Example, ...]
    replies: tuple[ReplyLine, ...]
    routes: Path | None = None  # routes.toml; None: the bundle gets no table of routes

    def phrases(self) -> list[str]:
        """Every distinct phrase a user may say, in file order."""
        examples = (*self.intents, *self.out_of_scope, *self.emotions, *self.toxicity, *self.contexts)
        said = [example.text for example in examples] + [
            prompt for reply in self.replies for prompt in reply.prompts
        ]
        return list(dict.fromkeys(said))


def load(folder: Path | None = None) -> Content:
    """Parse the content folder (default: the one shipped with the package); raises ContentInvalid."""
    root = folder or Path(str(files("statics") / "starter"))
    routes = root / "routes.toml"
    return Content(
        intents=tuple(e for path in sorted((root / "intents").glob("*.txt")) for e in read_labelled(path)),
        out_of_scope=tuple(read_labelled(root / "out_of_scope.txt", label="out_of_scope")),
        emotions=tuple(read_labelled(root / "emotions.txt")),
        toxicity=tuple(read_labelled(root / "toxicity.txt")),
        contexts=tuple(_contexts(root / "contexts.tsv")),
        replies=tuple(line for path in sorted((root / "replies").glob("*.toml")) for line in _replies(path)),
        routes=routes if routes.exists() else None,
    )


def read_labelled(path: Path, *, label: str = "") -> Iterator[Example]:
    """Phrases under `## label` headings, slots marked inline."""
    for number, line in _lines(path):
        if line.startswith("##"):
            label = line[3:].strip()
            if not label or line[2] != " ":
                raise ContentInvalid(f"{path.name}:{number}: expected '## label'")
        elif not label:
            raise ContentInvalid(f"{path.name}:{number}: a phrase before the first '## label' line")
        else:
            text, slots = _unmark(line, f"{path.name}:{number}")
            yield Example(text, label, path.stem, slots)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip(" ")  # not tabs: they part the fields of a TSV, and the last may be empty
        if line.strip() and (line.startswith("##") or not line.startswith("#")):
            yield number, line


def _unmark(line: str, where: str) -> tuple[str, tuple[Slot, ...]]:
    text, slots, position = "", [], 0
    for match in _MARK.finditer(line):
        text += line[position : match.start()]
        slots.append(Slot(match[2], len(text), len(text) + len(match[1])))
        text += match[1]
        position = match.end()
    text += line[position:]
    if set("[]()") & set(text):
        raise ContentInvalid(f"{where}: brackets that do not form [text](slot)")
    return text, tuple(slots)


def _contexts(path: Path) -> Iterator[Example]:
    for number, line in _lines(path):
        fields = line.split("\t")
        if len(fields) != 3 or not all(fields) or not fields[0].startswith(("assistant: ", "user: ")):
            raise ContentInvalid(f"{path.name}:{number}: expected 'role: previous turn<TAB>phrase<TAB>label'")
        role, _, said = fields[0].partition(": ")
        yield Example(fields[1], fields[2], context=(Turn("user" if role == "user" else "assistant", said),))


def _replies(path: Path) -> Iterator[ReplyLine]:
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ContentInvalid(f"{path.name}: {error}") from error
    for count, group in enumerate(document.get("group", ()), 1):
        _check(f"{path.name}: group {count}", group, _GROUP)
        said = [(voice, text) for voice in ("any", "calm", "lively") for text in group.get(voice, ())]
        for number, (voice, text) in enumerate(said, 1):
            yield ReplyLine(
                id=f"{group['topic']}.{number}",
                text=text,
                prompts=tuple(group["prompts"]),
                persona="" if voice == "any" else voice,
                emotion=group["emotion"],
                topic=group["topic"],
                group=path.stem,
            )
    for count, promotion in enumerate(document.get("promotion", ()), 1):
        _check(f"{path.name}: promotion {count}", promotion, _PROMOTION)
        yield ReplyLine(
            id=promotion["id"],
            text=promotion["reply"],
            prompts=tuple(promotion["prompts"]),
            persona=promotion["persona"],
            surface=promotion["surface"],
            topic="promotion",
            group=path.stem,
            valid_from=promotion["valid_from"],
            valid_until=promotion["valid_until"],
        )


def _check(where: str, table: dict[str, Any], kinds: dict[str, type]) -> None:
    """A voice may be left out of a group; anything else must be there, of its kind, and nothing more."""
    missing = {"any": [], "calm": [], "lively": []} | table
    wrong = [name for name, kind in kinds.items() if not isinstance(missing.get(name), kind)]
    if wrong or not table.keys() <= kinds.keys():
        names = ", ".join([*wrong, *sorted(table.keys() - kinds.keys())])
        raise ContentInvalid(f"{where}: {names}: missing, of the wrong kind or unknown")
