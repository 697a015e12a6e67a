"""Routes: a small table in the bundle that says, of everything understood about a turn, what is to happen next.

`routes.toml` is a list of rules; the first whose conditions all hold is taken, and the last has none. The table is read,
checked and compiled once, so a turn costs microseconds. A condition on a head that failed, was skipped or was not asked
does not hold, whatever it asks for: what is unknown is never taken for "no".
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from annotators.annotator import Annotation, Status
from annotators.head import Spec
from index.items import EVERYONE
from index.replies import Hit
from nlu.errors import EngineRefused
from nlu.types import Route, RouteTo

FILE = "routes.toml"
MAX_BYTES = 64 * 1024
MAX_RULES = 256  # each is tried in some turn, and held against all before it when the table is loaded
ABSTAINS = "(abstains)"  # what a head's label is where it accepts none
_MOST_SHOWN = 3  # of the names a condition allows, in an explanation

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]  # TOML has lists only
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class HeadSays(_Strict):
    """What a head must say: its best label, accepted, is one of these; with this score at least; or it abstains."""

    label: Names | None = None
    score: Share | None = None
    abstains: Literal[True] | None = None
    out_of_scope: Share | None = None  # at least

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("it asks nothing of the head")
        if self.abstains and (self.label or self.score):
            raise ValueError("abstains and label or score never hold together")
        return self


class BestReply(_Strict):
    """What the best reply, after ranking, must be: this close, with one of these tags, one of these personas' own."""

    similarity: Share | None = None
    tag: Names | None = None
    persona: Names | None = None

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("it asks nothing of the reply")
        return self


class When(_Strict):
    """The conditions of one rule; none at all is the default, which takes every turn that comes to it."""

    head: dict[str, HeadSays] = {}
    reply: BestReply | None = None
    surface: Names | None = None
    locale: Names | None = None  # "ru" takes ru-RU too


class Rule(_Strict):
    """One [[route]]."""

    name: Name
    to: RouteTo
    when: When = When()


class Table(_Strict):
    """routes.toml."""

    route: Annotated[tuple[Rule, ...], Field(strict=False, min_length=1, max_length=MAX_RULES)]


class Facts(NamedTuple):
    """What a rule may ask about."""

    heads: Mapping[str, Annotation]
    best: Hit | None  # behind the first candidate
    personas: Sequence[str]  # of the index, in the order of its masks
    surface: str
    locale: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """There is nothing to hold a condition against."""

    why: str


Value = tuple[str, ...] | float | Unknown
Bound = frozenset[str] | float  # one of these names, or at least this number
Read = Callable[[Facts], Value]


class Condition(NamedTuple):
    """What is found under `on` keeps to the bound; whatever is unknown keeps to none."""

    on: str
    bound: Bound

    def holds(self, value: Value) -> bool:
        if isinstance(self.bound, frozenset):
            return isinstance(value, tuple) and not self.bound.isdisjoint(value)
        return isinstance(value, float) and value >= self.bound

    def told(self, value: Value) -> str:
        """What was found, and where that was not enough, what was expected."""
        if isinstance(value, Unknown):
            return f"{self.on} is unknown: {value.why}"
        found = f"{value:.2f}" if isinstance(value, float) else ", ".join(value) or "none"
        if self.holds(value):
            return f"{self.on} is {found}"
        expected = _names(self.bound) if isinstance(self.bound, frozenset) else f"{self.bound:.2f} or more"
        return f"{self.on} is {found}, not {expected}"


class Found(dict[str, Value]):
    """What conditions are held against, read off the facts when it is first asked for."""

    def __init__(self, reads: Mapping[str, Read], facts: Facts) -> None:
        super().__init__()
        self._reads, self._facts = reads, facts

    def __missing__(self, on: str) -> Value:
        value = self[on] = self._reads[on](self._facts)
        return value


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule as it is tried."""

    name: str
    to: RouteTo
    conditions: tuple[Condition, ...]

    def failing(self, found: Found) -> Condition | None:
        """The first condition that does not hold."""
        for condition in self.conditions:
            if not condition.holds(found[condition.on]):
                return condition
        return None

    def covers(self, other: CompiledRule) -> bool:
        """Whether every turn that `other` would take is one that this rule takes."""
        theirs = dict(other.conditions)
        return all(on in theirs and _within(theirs[on], bound) for on, bound in self.conditions)


@dataclass(frozen=True)
class Routes:
    """A checked table. Immutable and thread-safe."""

    where: str  # for messages
    table: Table
    rules: tuple[CompiledRule, ...]
    reads: Mapping[str, Read]  # of everything that some condition is on

    @classmethod
    def load(cls, folder: Path) -> Routes:
        """Read routes.toml; raises EngineRefused with the rule, what was found and what to do."""
        where = f"{folder.name}/{FILE}"
        table = _read(folder / FILE, where)
        rules: list[CompiledRule] = []
        reads: dict[str, Read] = {}
        for rule in table.route:
            asked = list(_asked(rule.when))
            rules.append(CompiledRule(rule.name, rule.to, tuple(condition for condition, _ in asked)))
            reads |= {condition.on: read for condition, read in asked}
        _check_order(rules, where)
        return cls(where, table, tuple(rules), reads)

    def check(
        self,
        heads: Mapping[str, Spec],
        *,
        personas: Sequence[str],
        surfaces: Sequence[str],
    ) -> None:
        """Refuse whatever this bundle's heads and index do not know: such a rule could never match. Raises EngineRefused."""
        for number, rule in enumerate(self.table.route, 1):
            when, part = rule.when, _part(self.where, number, rule.name)
            for name, says in when.head.items():
                _check_known(part, "head", (name,), heads)
                _check_head(part, heads[name], says)
            if when.reply is not None:
                _check_known(part, "reply.persona", when.reply.persona, personas)
            _check_known(part, "surface", when.surface, surfaces)

    def idle(self, carried: Callable[[str], bool]) -> Iterator[str]:
        """What to tell of rules whose tags no reply has, which `carried` knows: no error, for replies come and go."""
        for number, rule in enumerate(self.table.route, 1):
            if rule.when.reply is not None:
                for tag in rule.when.reply.tag or ():
                    if not carried(tag):
                        yield f"{_part(self.where, number, rule.name)}: no reply of the index carries the tag {tag!r}"

    def take(self, facts: Facts, *, explain: bool = False) -> Route:
        """The first rule whose conditions all hold. With `explain`, a line for each rule that was tried: the condition
        that failed first, and for the one that is taken what it found."""
        found = Found(self.reads, facts)
        because: list[str] = []
        for rule in self.rules:
            failing = rule.failing(found)
            if failing is None:
                break
            if explain:
                because.append(f"{rule.name}: {failing.told(found[failing.on])}")
        if explain:
            held = "; ".join(condition.told(found[condition.on]) for condition in rule.conditions)
            because.append(f"{rule.name}: {held or 'takes what no other rule took'}")
        return Route(rule.to, rule.name, tuple(because))


def _read(path: Path, where: str) -> Table:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EngineRefused(
            where, found=f"no readable file ({error.strerror})", expected="a table of routes", remedy="build the part again"
        ) from error  # fmt: skip
    if len(raw) > MAX_BYTES:
        raise EngineRefused(
            where, found="a larger file", expected=f"at most {MAX_BYTES} bytes", remedy="write fewer rules"
        )
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineRefused(
            where, found=f"unreadable text ({error})", expected="TOML in UTF-8", remedy="mend the file"
        ) from error
    try:
        return Table.model_validate(document)
    except ValidationError as error:
        raise _invalid(error, where) from error


def _invalid(error: ValidationError, where: str) -> EngineRefused:
    """Pydantic's first complaint in our words; rules count from 1."""
    first = error.errors(include_url=False)[0]
    path = [str(step + 1) if isinstance(step, int) else step for step in first["loc"]]
    place = " ".join(["rule", path[1], ".".join(path[2:])]) if len(path) > 1 else ".".join(path)
    said = first["msg"].removeprefix("Value error, ")
    return EngineRefused(
        f"{where} {place}".rstrip(),
        found=f"{first['input']!r:.80} ({said})",
        expected="[[route]] with name, to and when, as in docs/routing.md",
        remedy="mend the rule",
    )


def _asked(when: When) -> Iterator[tuple[Condition, Read]]:
    """A rule's conditions, each with the function that reads what it is held against."""
    wanted: list[tuple[str, Sequence[str] | float | None, Read]] = [
        ("surface", when.surface, _surface),
        ("locale", None if when.locale is None else [_language_tag(name) for name in when.locale], _locale),
    ]
    for name, says in when.head.items():
        wanted += [
            (f"{name}.label", (ABSTAINS,) if says.abstains else says.label, _of(name, _label)),
            (f"{name}.score", says.score, _of(name, _score)),
            (f"{name}.out_of_scope", says.out_of_scope, _of(name, _out_of_scope)),
        ]
    if when.reply is not None:
        wanted += [
            ("reply.tag", when.reply.tag, _tags),
            ("reply.persona", when.reply.persona, _personas),
            ("reply.similarity", when.reply.similarity, _similarity),
        ]
    for on, bound, read in wanted:
        if bound is not None:
            yield Condition(on, float(bound) if isinstance(bound, float | int) else frozenset(bound)), read


def _surface(facts: Facts) -> Value:
    return (facts.surface,) if facts.surface else Unknown("none was sent")


def _locale(facts: Facts) -> Value:
    """Every prefix of the language tag, so that `ru` is found in ru-RU (RFC 4647, basic filtering)."""
    if not facts.locale:
        return Unknown("none was sent")
    subtags = _language_tag(facts.locale).split("-")
    return tuple("-".join(subtags[:count]) for count in range(1, len(subtags) + 1))


def _language_tag(locale: str) -> str:
    return locale.lower().replace("_", "-")


def _of(head: str, pick: Callable[[Annotation], Value]) -> Read:
    """Part of what a head said, where it said anything."""

    def read(facts: Facts) -> Value:
        annotation = facts.heads.get(head)
        if annotation is None:
            return Unknown("the head was not asked")
        if annotation.status is Status.ERROR or annotation.status is Status.SKIPPED:
            return Unknown(f"{annotation.status.value}, {annotation.note}")
        return pick(annotation)

    return read


def _label(annotation: Annotation) -> Value:
    best = annotation.labels[0] if annotation.labels else None
    return (best.label,) if best is not None and best.accepted else (ABSTAINS,)


def _score(annotation: Annotation) -> Value:
    best = annotation.labels[0] if annotation.labels else None
    return float(best.score) if best is not None and best.accepted else Unknown("the head abstains")


def _out_of_scope(annotation: Annotation) -> Value:
    score = annotation.out_of_scope
    return Unknown("the head gave no such score") if score is None else float(score)


_NO_REPLY = Unknown("there is no reply")


def _similarity(facts: Facts) -> Value:
    return _NO_REPLY if facts.best is None else float(facts.best.similarity)


def _tags(facts: Facts) -> Value:
    return _NO_REPLY if facts.best is None else facts.best.item.tags


def _personas(facts: Facts) -> Value:
    """Whose own the reply is; nobody's, where everybody may say it."""
    if facts.best is None:
        return _NO_REPLY
    mask = facts.best.item.persona_mask
    if mask == EVERYONE:
        return ()
    return tuple(name for bit, name in enumerate(facts.personas) if mask >> bit & 1)


def _check_order(rules: Sequence[CompiledRule], where: str) -> None:
    """Every rule can be reached, and something is always taken."""
    for number, rule in enumerate(rules, 1):
        for before, earlier in enumerate(rules[: number - 1], 1):
            if earlier.covers(rule):
                raise EngineRefused(
                    _part(where, number, rule.name),
                    found=f"a rule that rule {before} {earlier.name} leaves nothing to",
                    expected="a turn that comes this far",
                    remedy="move it up, change its conditions, or drop it",
                )
    if rules[-1].conditions:
        raise EngineRefused(
            _part(where, len(rules), rules[-1].name),
            found="conditions in the last rule",
            expected="a last rule without `when`, which takes every other turn",
            remedy="add one",
        )


def _check_head(part: str, spec: Spec, says: HeadSays) -> None:
    if spec.kind == "token":
        raise EngineRefused(
            part,
            found=f"head {spec.name} of kind token",
            expected="a head that gives labels",
            remedy="ask another head; spans are not for rules",
        )
    _check_known(part, f"head.{spec.name}.label", says.label, spec.labels)
    if says.out_of_scope is not None and spec.outside is None:
        raise EngineRefused(
            part,
            found=f"out_of_scope of head {spec.name}",
            expected="a head with a score of being out of scope",
            remedy="train the head with outside phrases, or ask another head",
        )


def _check_known(
    part: str,
    what: str,
    asked: Sequence[str] | None,
    known: Collection[str],
) -> None:
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise EngineRefused(
            part,
            found=f"{what} {', '.join(map(repr, unknown))}",
            expected=f"some of {', '.join(sorted(known)) or 'nothing: the bundle has none'}",
            remedy="mend the rule, or put into the bundle what it asks for",
        )


def _within(inner: Bound, outer: Bound) -> bool:
    if isinstance(inner, frozenset):
        return isinstance(outer, frozenset) and inner <= outer
    return isinstance(outer, float) and inner >= outer


def _names(bound: frozenset[str]) -> str:
    names = sorted(bound)
    rest = len(names) - _MOST_SHOWN
    return " or ".join(names[:_MOST_SHOWN]) + (f" or {rest} more" if rest > 0 else "")


def _part(where: str, number: int, name: str) -> str:
    return f"{where} rule {number} {name}"
