"""Heads made of word lists and regular expressions, for what must never depend on a model.

Rules live in head.json under params.rules: {"label", "phrases": [...]} answers when the whole phrase is one of the list;
{"label", "pattern": "..."} marks every match as a span. params.tests, {phrase: [label or label=text, ...]}, say what must
come out; a head that fails one of its own does not load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from annotators.annotator import Annotation, Heard, Label, Span, Status
from annotators.head import HeadInvalid, Spec, expect_shapes, read, write

_EDGES = " .!?,"  # around a phrase these change nothing, neither in the list nor in what was said


class Rule(BaseModel):
    """One entry of params.rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = ""
    phrases: tuple[str, ...] = ()
    pattern: str | None = None


_RULES = TypeAdapter(tuple[Rule, ...])


@dataclass(frozen=True)
class RulesHead:
    """Exact phrases become labels with score 1, pattern matches become spans with score 1."""

    spec: Spec
    version: str = ""
    phrases: dict[str, str] = field(init=False, repr=False)  # phrase -> label
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        phrases: dict[str, str] = {}
        patterns: list[tuple[str, re.Pattern[str]]] = []
        for rule in self._rules():
            if rule.label not in self.spec.labels:
                raise HeadInvalid(
                    self.spec.name,
                    found=f"a rule for label {rule.label!r}",
                    expected="one of the head's labels",
                )
            for phrase in rule.phrases:
                if phrases.setdefault(phrase.strip(_EDGES), rule.label) != rule.label:
                    raise HeadInvalid(
                        self.spec.name, found=f"{phrase!r} under two labels", expected="one label a phrase"
                    )
            if rule.pattern is not None:
                patterns.append((rule.label, compiled(self.spec.name, rule.pattern)))
        object.__setattr__(self, "phrases", phrases)
        object.__setattr__(self, "patterns", tuple(patterns))
        self._test()

    def _test(self) -> None:
        tests = self.spec.params.get("tests", {})
        if not isinstance(tests, dict) or not all(isinstance(each, list | tuple) for each in tests.values()):
            raise HeadInvalid(
                self.spec.name, found=f"params.tests = {tests!r}", expected="lists of expectations by phrase"
            )
        for phrase, expected in tests.items():
            labels, spans = self.matched(phrase)
            found = [*labels, *(f"{span.label}={phrase[span.start : span.end]}" for span in spans)]
            if found != list(expected):
                raise HeadInvalid(
                    self.spec.name, found=f"{phrase!r} answered with {found}", expected=str(list(expected)), remedy="mend the rule or its test"
                )  # fmt: skip

    def _rules(self) -> tuple[Rule, ...]:
        try:
            return _RULES.validate_python(self.spec.params.get("rules", ()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["params.rules", *map(str, first["loc"])])
            raise HeadInvalid(
                self.spec.name,
                found=f"{where}: {first['msg']}",
                expected="rules of a label with phrases or a pattern",
                remedy="mend the rule",
            ) from error

    @classmethod
    def load(cls, folder: Path) -> RulesHead:
        """Read a head folder; raises HeadInvalid."""
        spec, tensors, version = read(folder)
        expect_shapes(spec, tensors, {})
        return cls(spec, version)

    def save(self, folder: Path) -> None:
        """Write a head folder."""
        write(folder, self.spec, {})

    def annotate(self, heard: Heard) -> Annotation:
        """Match the best hypothesis."""
        names, spans = self.matched(heard.phrases[heard.best])
        labels = tuple(Label(name, 1.0, True, 1.0, 1.0) for name in names)
        return Annotation(
            self.spec.name, self.spec.kind, Status.OK, labels=labels, spans=spans, version=self.version
        )

    def matched(self, phrase: str) -> tuple[tuple[str, ...], tuple[Span, ...]]:
        """The label of the whole phrase, if a list has it, and every match of a pattern."""
        label = self.phrases.get(phrase.strip(_EDGES))
        spans = [
            Span(name, match.start(), match.end(), 1.0)
            for name, pattern in self.patterns
            for match in pattern.finditer(phrase)
        ]
        return () if label is None else (label,), tuple(
            sorted(spans, key=lambda span: (span.start, span.end))
        )


def compiled(head: str, pattern: str) -> re.Pattern[str]:
    """A pattern of a head; raises HeadInvalid where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise HeadInvalid(
            head, found=f"pattern {pattern!r}: {error}", expected="a regular expression", remedy="mend it"
        ) from error
