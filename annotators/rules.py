"""Heads made of word lists and regular expressions, for what must never depend on a model.

Rules live in head.json under params.rules: {"label", "phrases": [...]} answers when the whole phrase is one of the list;
{"label", "pattern": "..."} marks every match as a span.
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
                patterns.append((rule.label, self._compile(rule.pattern)))
        object.__setattr__(self, "phrases", phrases)
        object.__setattr__(self, "patterns", tuple(patterns))

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

    def _compile(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise HeadInvalid(
                self.spec.name,
                found=f"pattern {pattern!r}: {error}",
                expected="a regular expression",
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
        phrase = heard.phrases[heard.best]
        label = self.phrases.get(phrase.strip(_EDGES))
        labels = () if label is None else (Label(label, 1.0, True, 1.0, 1.0),)
        spans = tuple(
            sorted(
                (Span(name, match.start(), match.end(), 1.0) for name, pattern in self.patterns for match in pattern.finditer(phrase)),
                key=lambda span: (span.start, span.end),
            )
        )  # fmt: skip
        return Annotation(
            self.spec.name, self.spec.kind, Status.OK, labels=labels, spans=spans, version=self.version
        )
