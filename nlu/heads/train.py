"""One sprint's training, told once: labelled phrases in, a calibrated head, its report and its canaries out. No torch.

    nlu heads train --data phrases.tsv --name coffee --out heads/coffee
    nlu heads train coffee.toml --out heads/coffee

Read, check, encode, fit, save, and only then look at the test split.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotators import table
from annotators.anchors import AnchorsHead
from annotators.fit import About, Fitted, Plan
from annotators.head import SPEC_FILE, Requires, Spec
from annotators.learners import BoostedLearner, HiddenLearner, Learner, LinearLearner
from annotators.rules import RulesHead
from annotators.table import Head
from nlu import canaries
from nlu.heads import check, data, page, report, trials
from nlu.heads.classes import fit_classes, report_classes
from nlu.heads.config import HeadConfig
from nlu.heads.data import DataInvalid, Finding
from nlu.heads.material import Materials, encode
from nlu.heads.tokens import fit_tokens, report_tokens
from nlu.vector_store import VectorStore
from nlu.vectorizer import Vectorizer

REPORT, PAGE = "report.json", "report.html"
_SHOWN = 10  # findings in a refusal

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    folder: Path  # the head's own folder, which is what bundles take
    report: dict[str, Any]
    findings: tuple[Finding, ...]


@dataclass
class Clock:
    """Seconds of each part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def train(
    config: HeadConfig, vectorizer: Vectorizer, store: Path, out: Path, *, workers: int, progress: Progress
) -> Trained:
    """Train a head into `out`/head.NAME, and its report beside it. Raises DataInvalid and ValueError."""
    clock, folder = Clock(), _folder(config, out)
    if config.kind == "rules":
        return _rules(config, vectorizer, folder, clock)
    with clock.part("read"):
        dataset = data.read(config, uncased=vectorizer.spec.uncased)
        findings = (*dataset.findings, *check.texts(dataset, config))
        _refuse(findings)

    def encoding(done: int, total: int) -> None:
        progress("encoding", done, total)

    with closing(VectorStore(store, vectorizer, workers, encoding)) as vectors:
        with clock.part("encode"):
            materials = encode(dataset, vectors, tokens=config.kind == "token")
            counts = {"encoded": vectors.encoded, "from_store": vectors.met}
        with clock.part("fit"):
            progress("fitting", 0, 1)
            made = _fit(config, vectorizer, materials)
            progress("fitting", 1, 1)
        _save(made if isinstance(made, AnchorsHead) else made.head, folder, vectorizer)
        with clock.part("report"):
            head = table.load(folder)  # what ships, with its weights rounded
            found = {
                "format": report.FORMAT,
                "head": _head(head, config),
                "data": report.about(dataset),
                "vectors": counts,
                "findings": [finding._asdict() for finding in findings],
            } | _measured(config, head, made, materials, vectors, progress)
    return _written(folder, found, clock, findings)


def plan_of(config: HeadConfig) -> Plan:
    """How the config wants classes to be fitted."""
    strengths = {"strengths": tuple(sorted(config.regularisations))} if config.regularisations else {}
    learner: Learner = LinearLearner(**strengths)
    if config.kind == "boosted":
        learner = BoostedLearner(leaves=config.leaves, seed=config.seed, **strengths)
    elif config.hidden:
        learner = HiddenLearner(config.hidden, seed=config.seed, **strengths)
    return Plan(
        learner=learner, folds=config.folds, balanced=config.balanced, beta=config.beta,
        outside_share=config.outside_share, seed=config.seed,
    )  # fmt: skip


def _fit(config: HeadConfig, vectorizer: Vectorizer, materials: Materials) -> Any:
    about = About(config.name, config.task or config.kind, vectorizer.fingerprint, made_by=_made_by(config))
    if config.kind == "token":
        return fit_tokens(config, about, materials)
    return fit_classes(config, about, materials, plan_of(config))


def _measured(
    config: HeadConfig,
    head: Head,
    made: Any,
    materials: Materials,
    vectors: VectorStore,
    progress: Progress,
) -> dict[str, Any]:
    """What the report says of the head itself."""
    found: dict[str, Any] = {
        "measured_on": "test" if len(materials.test) else "folds",
        "cost_us": report.cost_us(head, materials.test if len(materials.test) else materials.train),
        "golden": [
            {"text": golden.text, "label": golden.label or ", ".join(golden.spans)}
            for golden in head.spec.golden
        ],
    }
    if config.kind == "token":
        return found | report_tokens(head, made, materials)
    sections = report_classes(config, head, made, materials, vectors)
    if not sections:
        return found | {"measured_on": None}
    found |= sections
    if isinstance(made, Fitted):
        found |= trials.run(config, plan_of(config), made, materials, progress)
        if curve := found.get("learning_curve"):
            curve.append({"rows": len(materials.train), "accuracy": found["summary"]["accuracy"]})
    return found


def _head(head: Head, config: HeadConfig) -> dict[str, Any]:
    spec = head.spec
    return {
        "name": spec.name, "kind": spec.kind, "task": spec.task, "labels": list(spec.labels), "version": head.version,
        "vectorizer": spec.requires.vectorizer, "made_by": spec.made_by, "exclusive": spec.exclusive, "beta": config.beta,
        "params": {name: value for name, value in spec.params.items() if name not in ("rules", "patterns", "tests")},
        "config": json.loads(config.model_dump_json(exclude_defaults=True)),
    }  # fmt: skip


def _made_by(config: HeadConfig) -> str:
    return config.made_by or ", ".join(path.name for path in config.files.train) or "rules"


def _folder(config: HeadConfig, out: Path) -> Path:
    """Where the head will be; raises ValueError where something else is."""
    folder = out / f"head.{config.name}"
    if folder.exists() and not (folder / SPEC_FILE).exists():
        raise ValueError(
            f"{folder}: found what is no head, expected nothing or a head to replace; choose another --out"
        )
    return folder


def _save(head: Head, folder: Path, vectorizer: Vectorizer) -> None:
    """Write the head in the place of the one that may be there."""
    shutil.rmtree(folder, ignore_errors=True)
    head.save(folder)
    canaries.write(folder, vectorizer)


def _written(folder: Path, found: dict[str, Any], clock: Clock, findings: tuple[Finding, ...]) -> Trained:
    found["head"]["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    found["seconds"] = {name: round(seconds, 3) for name, seconds in clock.seconds.items()}
    found["seconds"]["total"] = round(sum(clock.seconds.values()), 3)
    text = json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False)
    (folder.parent / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder.parent / PAGE).write_text(page.render(found), encoding="utf-8")
    return Trained(folder, found, findings)


def _rules(config: HeadConfig, vectorizer: Vectorizer, folder: Path, clock: Clock) -> Trained:
    """Rules are not fitted; their own tests are what is measured, by the head itself."""
    labels = tuple(dict.fromkeys(str(rule["label"]) for rule in config.rules))
    params: dict[str, Any] = {"rules": [dict(rule) for rule in config.rules]}
    if config.tests:
        params["tests"] = {phrase: list(expected) for phrase, expected in config.tests.items()}
    count = len(labels)
    with clock.part("fit"):
        spec = Spec(
            name=config.name, kind="rules", task=config.task or "rules", labels=labels, scale=(1.0,) * count,
            shift=(0.0,) * count, thresholds=(1.0,) * count, requires=Requires(vectorizer=vectorizer.fingerprint),
            params=params, made_by=_made_by(config),
        )  # fmt: skip
        _save(RulesHead(spec), folder, vectorizer)
    found = {
        "format": report.FORMAT,
        "head": _head(table.load(folder), config),
        "summary": {"tests": len(config.tests)},
    }
    return _written(folder, found, clock, ())


def _refuse(findings: tuple[Finding, ...]) -> None:
    wrong = [finding for finding in findings if finding.severity == "error"]
    if wrong:
        lines = [f"{each.where}: {each.what}: found {each.found}; {each.remedy}" for each in wrong[:_SHOWN]]
        more = (
            f"\n... and {len(wrong) - _SHOWN} more; `nlu heads check` shows all"
            if len(wrong) > _SHOWN
            else ""
        )
        raise DataInvalid(f"data: found {len(wrong)} errors, expected none:\n" + "\n".join(lines) + more)
