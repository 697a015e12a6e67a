"""What to train: a head's name, its kind, where its phrases are, and how it is fitted. From TOML, or from options alone."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from annotators.fit import FOLDS
from annotators.fit_outside import SHARE
from annotators.thresholds import DEFAULT_BETA

Kind = Literal["sentence", "context", "token", "anchors", "boosted", "rules"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Strength = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
OUTSIDE_LABELS = ("oos", "out_of_scope", "out-of-scope")
COLUMNS = ("text", "label", "labels", "spans", "context", "split", "weight", "tokens", "tags")


class Files(BaseModel):
    """Where the phrases are; a file may also name the split of each row in a column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[Path, ...] = ()
    dev: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    outside: tuple[Path, ...] = ()  # phrases that belong to no label


class HeadConfig(BaseModel):
    """Everything that decides what comes out; saved with the report."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,56}$")
    kind: Kind = "sentence"
    task: str = ""
    files: Files = Files()
    columns: dict[str, str] = {}  # ours -> the file's, e.g. text = "utterance"
    skip_bad: bool = False  # leave rows out that cannot be read, instead of training nothing
    made_by: str = ""  # recorded in the head: what it was trained on

    multi: bool = False  # any number of labels a phrase
    balanced: bool = False  # rare labels count as much as frequent ones
    beta: float = Field(DEFAULT_BETA, gt=0)  # thresholds are best for this F-beta; above 1 prefers recall
    folds: int = Field(FOLDS, ge=2, le=20)
    regularisations: tuple[Strength, ...] = ()  # to choose among; empty: the kind's own
    hidden: int = Field(0, ge=0, le=4096)  # units of a hidden layer; 0: none
    seed: int = 0

    outside: Literal["given", "labels", "none"] = "given"  # what the score of being out of scope learns from
    outside_labels: tuple[str, ...] = Field(OUTSIDE_LABELS, min_length=1)
    outside_share: Share = SHARE  # of all phrases, that are expected to be out of scope

    turns: int = Field(2, ge=1, le=16)  # of kind context: how many earlier turns it sees
    scheme: Literal["bio", "restore"] = "bio"  # of kind token; restore: punctuation and case
    patterns: dict[str, tuple[str, ...]] = {}  # of kind anchors: regular expressions by label
    rules: tuple[dict[str, Any], ...] = ()  # of kind rules: {label, phrases} or {label, pattern}
    tests: dict[str, tuple[str, ...]] = {}  # of kind rules: phrase -> what must come out
    leaves: int = Field(15, ge=2, le=255)  # of kind boosted

    shots: tuple[Count, ...] = ()  # also measure with so many phrases a label
    shot_seeds: int = Field(5, ge=1, le=100)
    cross_validate: int = Field(0, ge=0, le=20)  # folds of a cross-validation over train; 0: none
    learning_curve: bool = True

    @model_validator(mode="before")
    @classmethod
    def _usual_beta(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Spans and anchors have nothing like the cost of a missed intent: precision counts as much as recall."""
        return {"beta": 1.0, **given} if given.get("kind") in ("token", "anchors") else given

    @model_validator(mode="after")
    def _fits(self) -> HeadConfig:
        own = {"turns": "context", "scheme": "token", "patterns": "anchors", "rules": "rules", "tests": "rules", "leaves": "boosted", "hidden": "sentence"}  # fmt: skip
        for field, kind in own.items():
            if field in self.model_fields_set and self.kind != kind and getattr(self, field):
                raise ValueError(
                    f"{field}: found in a head of kind {self.kind}, expected only in kind {kind}"
                )
        if self.multi and self.kind != "sentence":
            raise ValueError(f"multi: found in a head of kind {self.kind}, expected only in kind sentence")
        if self.kind == "rules" and not self.rules:
            raise ValueError("rules: found none, expected [[rules]] with label and phrases or a pattern")
        if not all(rule.get("label") for rule in self.rules):
            raise ValueError("rules: found a rule without a label, expected one in each")
        if self.cross_validate == 1:
            raise ValueError("cross_validate: found 1 fold, expected at least 2, or 0 for none")
        if unknown := set(self.columns) - set(COLUMNS):
            raise ValueError(
                f"columns: found {', '.join(sorted(unknown))}, expected some of {', '.join(COLUMNS)}"
            )
        return self


def load(path: Path | None, **options: Any) -> HeadConfig:
    """A TOML file with options in the place of its own values; options of None count as absent. Raises ValueError.

    Paths in the file are relative to it.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: found {error}, expected TOML; mend the file") from error
    given = {name: value for name, value in options.items() if value is not None}
    files = {**_files(path, document.get("files", {})), **given.pop("files", {})}
    try:
        return HeadConfig.model_validate({**document, **given, "files": files})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        remedy = "; mend the config" if path is not None else ""
        raise ValueError(f"{path or 'options'}: {where + ': ' if where else ''}{said}{remedy}") from error


def _files(path: Path | None, given: Any) -> dict[str, Any]:
    """The config's files by split, from where the config is."""
    if not isinstance(given, dict):
        raise ValueError(f"{path}: files: found {given!r}, expected a table [files]; mend the config")
    return {split: _beside(path, each) for split, each in given.items()} if path is not None else given


def _beside(path: Path, given: Any) -> list[Any]:
    """One path or several; what is none is left to the model to refuse."""
    named = given if isinstance(given, list) else [given]
    return [path.parent / each if isinstance(each, str) else each for each in named]
