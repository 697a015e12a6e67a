"""A sprint for every kind of head: what is learnt, what is asked, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlu.heads import config as configs
from nlu.heads.config import HeadConfig
from nlu.heads.train import Trained, train
from nlu.vectorizer import Vectorizer
from tests.nlu.heads import phrases
from tests.nlu.heads.phrases import Line


@dataclass(frozen=True)
class Sprint:
    """The lines of each split, and the options."""

    train: list[Line]
    test: list[Line] = field(default_factory=list)
    dev: list[Line] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path, **more: Any) -> HeadConfig:
        """The lines written to the folder, and what makes a head of them."""
        lines = {"train": self.train, "dev": self.dev, "test": self.test}
        files = {
            split: [phrases.written(folder / f"{split}.jsonl", each)] for split, each in lines.items() if each
        }
        return configs.load(None, **({"name": "sprint", "files": files} | self.options | more))

    def run(self, folder: Path, vectorizer: Vectorizer, store: Path, **more: Any) -> Trained:
        """Train it; everything is in the folder then."""
        config = self.config(folder, **more)
        return train(config, vectorizer, store, folder / "out", workers=1, progress=lambda *_: None)


KNOWN = phrases.labelled(15, 0)


def mislabelled(lines: list[Line]) -> list[Line]:
    """Every sixth line with the label of music, so that no measure is perfect."""
    return [line | {"label": "music"} if i % 6 == 0 else line for i, line in enumerate(lines)]


ASKED = [*mislabelled(phrases.labelled(12, 1)), {"text": "abc efg", "label": "never heard of"}]
STRANGE, STRANGE_ASKED = phrases.strange(12, 0), phrases.strange(8, 1)
RULES: list[dict[str, Any]] = [
    {"label": "stop", "phrases": ["stop", "стоп"]},
    {"label": "clock", "pattern": r"\d\d:\d\d"},
]

SPRINTS: dict[str, Sprint] = {
    "linear": Sprint(
        KNOWN + STRANGE, ASKED + STRANGE_ASKED, options={"shots": (2, 5), "shot_seeds": 3, "cross_validate": 3}
    ),
    "folds": Sprint(KNOWN + STRANGE, dev=phrases.labelled(4, 3)),
    "hidden": Sprint(KNOWN + STRANGE, ASKED + STRANGE_ASKED, options={"hidden": 8, "shots": (3,), "shot_seeds": 2}),
    "left out": Sprint(KNOWN, ASKED + STRANGE_ASKED, options={"outside": "labels"}),
    "several": Sprint(phrases.several(45, 0), phrases.several(30, 1), options={"multi": True}),
    "context": Sprint(phrases.answered(40, 0), mislabelled(phrases.answered(20, 1)), options={"kind": "context", "turns": 2}),
    "boosted": Sprint(KNOWN, ASKED, options={"kind": "boosted", "shots": (5,), "shot_seeds": 2}),
    "anchors": Sprint(
        phrases.labelled(3, 0), ASKED, options={"kind": "anchors", "patterns": {"lamp": (r"\bspark\b",)}}
    ),
    "anchors alone": Sprint(phrases.labelled(2, 0), options={"kind": "anchors"}),
    "spans": Sprint(phrases.marked(60, 0), phrases.marked(30, 1), options={"kind": "token"}),
    "spans of folds": Sprint(phrases.marked(60, 0), options={"kind": "token"}),
    "restore": Sprint(phrases.spelt(60, 0), phrases.spelt(30, 1), options={"kind": "token", "scheme": "restore"}),
    "rules": Sprint(
        [], options={"kind": "rules", "rules": RULES, "tests": {"stop.": ["stop"], "at 12:30": ["clock=12:30"]}}
    ),
}  # fmt: skip

Trainer = Callable[[str], Trained]
