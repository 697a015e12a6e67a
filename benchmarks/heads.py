"""How good are heads on public test splits, and how long do they take to train?

    python -m benchmarks.heads [--only clinc150,snips] [--data ../shared/data] [--save]
    python -m benchmarks.heads --table              # what is saved, and the peers beside it, as docs/heads.md shows it

Each set is trained by what `nlu heads train` runs, on the vectors of the shipped bundle; sets that have a peer are measured
beside it by `benchmarks.peers`. Figures are those of report.json, on the whole test split. Seconds are with all vectors
known; with an empty store, encoding comes on top (`python -m benchmarks.sprint`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.result import Bar, at_most, emit
from nlu.heads import config as configs
from nlu.heads.train import train
from nlu.heads.verdict import value_of
from nlu.progress import Bar as Track
from nlu.settings import shipped_bundle
from nlu.vectorizer import Vectorizer

STORE = Path(".cache/vectors")
RESULTS = Path(__file__).parent / "results"
_ACTS = {
    "inform": "inform", "inform_intent": "want", "request": "ask", "request_alts": "ask_others", "select": "choose",
    "affirm": "agree", "affirm_intent": "agree", "negate": "refuse", "negate_intent": "refuse", "thank_you": "thank",
    "goodbye": "leave",
}  # fmt: skip
_TURNS = 20_000  # of dialogs, for punctuation
Record = dict[str, Any]


def clinc150(data: Path, work: Path) -> Record:
    """150 intents and out of scope."""
    return {"files": _files(data / "clinc150", "tsv.gz", dev=True)}


def banking77(data: Path, work: Path) -> Record:
    """77 intents; also with 5 and 10 phrases each."""
    return {"files": _files(data / "banking77", "tsv.gz"), "shots": (5, 10), "shot_seeds": 5}


def goemotions(data: Path, work: Path) -> Record:
    """27 emotions and neutral, several a text."""
    return {"files": _files(data / "goemotions", "tsv.gz", dev=True), "multi": True, "beta": 1.0}


def davidson(data: Path, work: Path) -> Record:
    """Hate and offence against neither."""
    folder = data / "davidson_hate_offensive"
    files = {}
    for split in ("train", "dev", "test"):
        rows = (line.rstrip("\n").rpartition("\t") for line in _lines(folder / f"{split}.tsv.gz"))
        named = (
            {"text": text, "label": "acceptable" if label == "neither" else "toxic"}
            for text, _, label in rows
        )
        files[split] = [_written(work / f"davidson.{split}.jsonl", named)]
    return {"files": files, "beta": 1.0}


def snips(data: Path, work: Path) -> Record:
    """39 slots."""
    return {"kind": "token", "files": _files(data / "snips", "jsonl.gz")}


def wnut17(data: Path, work: Path) -> Record:
    """Rare entities in social media."""
    return {"kind": "token", "files": _files(data / "wnut17", "jsonl.gz", dev=True)}


def sgd_acts(data: Path, work: Path) -> Record:
    """What a user's turn does, in the turns before it and without."""
    files = {
        split: [_written(work / f"sgd.{split}.jsonl", _acts(data / "sgd" / f"dialogs_{split}.jsonl.gz"))]
        for split in ("train", "dev", "test")
    }
    return {"kind": "context", "turns": 2, "files": files, "beta": 1.0}


def dailydialog_acts(data: Path, work: Path) -> Record:
    """Four dialog acts of everyday talk, in the turns before and without."""
    files = {
        split: [_written(work / f"daily.{split}.jsonl", _daily(data / "dailydialog" / f"{split}.jsonl.gz"))]
        for split in ("train", "dev", "test")
    }
    return {"kind": "context", "turns": 2, "files": files, "beta": 1.0}


def punctuation(data: Path, work: Path) -> Record:
    """Marks and case of dialogs."""
    return _restoring(data / "self_dialogue", work, lambda path: _turns(path, _TURNS))


def ru_punctuation(data: Path, work: Path) -> Record:
    """Marks and case of Russian utterances."""
    return _restoring(
        data / "ru_utterances", work, lambda path: (line.split("\t")[0] for line in _lines(path))
    )


def ru_toxicity(data: Path, work: Path) -> Record:
    """Russian comments; the set has no test split, so that dev is the test and nothing is tuned on it."""
    folder = data / "ru_toxicity_detox"
    return {"files": {"train": [folder / "train.tsv.gz"], "test": [folder / "dev.tsv.gz"]}, "beta": 1.0}


def ru_entities(data: Path, work: Path) -> Record:
    """Persons, places and organisations of Russian news; trained on the small dev split, as the set has it."""
    folder = data / "factrueval2016"
    return {
        "kind": "token",
        "files": {"train": [folder / "dev.jsonl.gz"], "test": [folder / "test.jsonl.gz"]},
    }


SETS: Mapping[str, Callable[[Path, Path], Record]] = {
    each.__name__: each
    for each in (
        clinc150, banking77, goemotions, davidson, snips, wnut17, sgd_acts, dailydialog_acts, punctuation, ru_punctuation,
        ru_toxicity, ru_entities,
    )
}  # fmt: skip


def measure(name: str, data: Path, bundle: Path) -> dict[str, float]:
    """Train one head and take its figures."""
    vectorizer = Vectorizer(next(bundle.glob("vectorizer.*")))
    with tempfile.TemporaryDirectory() as folder, Track() as track:
        settings = SETS[name](data, Path(folder))
        config = configs.load(None, name=name, skip_bad=True, **settings)
        trained = train(config, vectorizer, STORE, Path(folder) / "out", workers=2, progress=track.step)
    report = trained.report
    figures = {measure: value_of(found) for measure, found in report["summary"].items()}
    if outside := report.get("outside"):
        figures |= {f"outside_{each}": value_of(outside[each]) for each in ("auroc", "recall", "false_alarms") if each in outside}  # fmt: skip
    for shots in report.get("few_shot", ()):
        figures[f"accuracy_{shots['shots']}_shots"] = value_of(shots["accuracy"])
    for step in report.get("ablation", ()):
        figures[f"accuracy {step['features']}"] = value_of(step["accuracy"])
    seconds = report["seconds"]
    return figures | {
        "train_s": seconds["fit"],
        "total_s": seconds["total"] - seconds["encode"],
        "head_bytes": report["head"]["bytes"],
        "cost_us": report["cost_us"],
    }


def main() -> None:
    """Train, measure, print; `--save` keeps what was measured beside the sets that were not asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"some of {', '.join(SETS)}")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the public sets lie")
    parser.add_argument("--bundle", type=Path, default=shipped_bundle(), help="whose vectorizer")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    parser.add_argument(
        "--table", action="store_true", help="print what is saved as Markdown, and measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join([_own_table(_kept()), *_peer_tables()]))
        return
    names = [name for name in arguments.only.split(",") if name] or list(SETS)
    if unknown := set(names) - set(SETS):
        parser.error(f"--only: found {', '.join(sorted(unknown))}, expected some of {', '.join(SETS)}")
    figures: dict[str, float] = _kept() if arguments.save and arguments.only else {}
    for name in names:
        found = measure(name, arguments.data, arguments.bundle)
        figures |= {f"{name}: {figure}": value for figure, value in found.items()}
        print(f"{name}: " + ", ".join(f"{figure} {value:.4g}" for figure, value in found.items()), flush=True)
    emit("heads", figures, _bars(figures))


def _bars(figures: Mapping[str, float]) -> list[Bar]:
    found = []
    if "clinc150: ece_after" in figures:
        found.append(at_most("expected calibration error on CLINC150", figures["clinc150: ece_after"], 0.03))
        missing = figures["clinc150: promised_recall"] - figures["clinc150: recall"]
        found.append(at_most("recall on CLINC150 short of what was promised", missing, 0.02))
    return found


def _kept() -> dict[str, float]:
    path = RESULTS / "heads.json"
    figures: dict[str, float] = json.loads(path.read_text())["figures"] if path.exists() else {}
    return figures


_LEADS = ("accuracy", "macro_f1", "micro_f1", "span_f1", "mark_f1", "case_f1", "auroc", "f_beta")


def _own_table(figures: Mapping[str, float]) -> str:
    """Every set a row."""
    lines = [
        "| set | on test | calibration error before, after | recall promised, kept | fit s | head kB | µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        found = {
            figure.removeprefix(f"{name}: "): value
            for figure, value in figures.items()
            if figure.startswith(f"{name}: ")
        }
        if not found:
            continue
        leads = [f"{lead.replace('_', ' ')} {found[lead]:.3f}" for lead in _LEADS if lead in found]
        leads += [f"{figure.replace('_', ' ')} {value:.3f}" for figure, value in found.items() if figure.startswith(("outside_", "accuracy_", "accuracy "))]  # fmt: skip
        errors = ", ".join(
            f"{found[each]:.3f}" if each in found else "-" for each in ("ece_before", "ece_after")
        )
        recall = (
            f"{found['promised_recall']:.3f}, {found['recall']:.3f}" if "promised_recall" in found else ""
        )
        lines.append(
            f"| {name} | {'; '.join(leads)} | {errors} | {recall} | {found['train_s']:.1f} | {found['head_bytes'] / 1e3:.0f} | {found['cost_us']:.0f} |"
        )
    return "\n".join(lines)


def _peer_tables() -> list[str]:
    """A table for each set that peers were measured on; seconds are CPU seconds, those of encoding included."""
    path = RESULTS / "peers.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    tables = []
    for name, peers in sorted(kept.items()):
        figures = {peer: entry["figures"] for peer, entry in peers.items()}
        columns = [figure for figure in _PEER_COLUMNS if any(figure in each for each in figures.values())]
        lines = [
            f"| {name} | {' | '.join(column.replace('_', ' ') for column in columns)} | seeds |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for peer, found in sorted(
            figures.items(), key=lambda each: -each[1].get("accuracy", each[1]["macro_f1"])
        ):
            cells = [_cell(found, column) for column in columns]
            lines.append(
                f"| {peer.removeprefix('benchmarks.ours:')} | {' | '.join(cells)} | {peers[peer]['seeds']} |"
            )
        tables.append("\n".join(lines))
    return tables


_PEER_COLUMNS = (
    "accuracy",
    "macro_f1",
    "auroc",
    "oos_auroc",
    "oos_recall",
    "fit_without_encoding_s",
    "fit_s",
    "score_ms",
)


def _cell(figures: Mapping[str, float], column: str) -> str:
    if column not in figures:
        return ""
    places = 1 if column.endswith("_s") else 2 if column.endswith("_ms") else 3
    deviation = figures.get(f"{column}_deviation")
    return f"{figures[column]:.{places}f}" + (
        f" ± {deviation:.{places}f}" if deviation and places == 3 else ""
    )


def _files(folder: Path, suffix: str, *, dev: bool = False) -> dict[str, list[Path]]:
    return {
        split: [folder / f"{split}.{suffix}"] for split in ("train", "dev", "test") if dev or split != "dev"
    }


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from file


def _written(path: Path, records: Iterator[Record]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


def _acts(path: Path) -> Iterator[Record]:
    """User turns that do one thing, what is said in passing left out, after the two turns before."""
    for line in _lines(path):
        turns = json.loads(line)["turns"]
        for i, turn in enumerate(turns):
            if turn["speaker"] != "user":
                continue
            acts = {_ACTS[act.lower()] for act in turn["acts"] if act.lower() in _ACTS}
            doing = acts - {"inform", "thank"} or acts
            if len(doing) == 1:
                yield {"text": turn["text"], "label": doing.pop(), "context": _before(turns, i, "user")}


def _daily(path: Path) -> Iterator[Record]:
    for line in _lines(path):
        turns = json.loads(line)["turns"]
        for i, turn in enumerate(turns):
            yield {"text": turn["text"], "label": turn["act"], "context": _before(turns, i, turn["speaker"])}


def _before(turns: list[Record], i: int, me: str) -> list[Record]:
    return [
        {"role": "user" if turn["speaker"] == me else "assistant", "text": turn["text"][:400]}
        for turn in turns[max(0, i - 2) : i]
    ]


def _turns(path: Path, most: int) -> Iterator[str]:
    said = (turn["text"] for line in _lines(path) for turn in json.loads(line)["turns"][:4])
    return islice(said, most)


def _restoring(folder: Path, work: Path, texts: Callable[[Path], Iterator[str]]) -> Record:
    suffix = "jsonl.gz" if (folder / "train.jsonl.gz").exists() else "tsv.gz"
    files = {}
    for split, most in (("train", _TURNS), ("test", _TURNS // 5)):
        kept = islice((text for text in texts(folder / f"{split}.{suffix}") if len(text) <= 160), most)
        files[split] = [_written(work / f"{split}.jsonl", ({"text": text} for text in kept))]
    return {"kind": "token", "scheme": "restore", "files": files}


if __name__ == "__main__":
    main()
