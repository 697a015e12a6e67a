"""`nlu heads check | train | compare | suggest`: from labelled phrases to a measured head."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nlu.commands.options import (
    BundleOption,
    JsonOption,
    extra,
    one_blas_thread,
    out,
    print_json,
    settings_for,
    vectorizer_folder,
    verified,
)
from nlu.progress import Bar, err

if TYPE_CHECKING:
    from nlu.heads.data import Dataset, Finding

app = typer.Typer()

StoreOption = Annotated[
    Path, typer.Option(help="Vectors are kept here, so that a second run need not encode.")
]
DataOption = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Labelled phrases: .tsv .csv .jsonl .parquet .conll, .gz too."),
]
DevOption = Annotated[list[Path] | None, typer.Option("--dev", help="Rows for calibration and thresholds.")]
TestOption = Annotated[list[Path] | None, typer.Option("--test", help="Rows that are only measured on.")]
OutsideOption = Annotated[
    list[Path] | None, typer.Option("--outside", help="Phrases that belong to no label.")
]
ConfigArgument = Annotated[
    Path | None, typer.Argument(exists=True, dir_okay=False, help="A TOML file; options win over it.")
]
KindOption = Annotated[
    Literal["sentence", "context", "token", "anchors", "boosted", "rules"] | None,
    typer.Option(help="What the head reads."),
]
ColumnsOption = Annotated[str, typer.Option(help="Names of columns, e.g. text=utterance,label=intent.")]
SchemeOption = Annotated[
    Literal["bio", "restore"] | None,
    typer.Option(help="Of kind token; restore: punctuation and case of plain texts."),
]
MultiOption = Annotated[bool | None, typer.Option("--multi", help="Any number of labels a phrase.")]
_MARKS = {"error": "bold red", "warning": "yellow", "note": "dim"}


@app.command()
def check(
    config: ConfigArgument = None,
    data: DataOption = None,
    dev: DevOption = None,
    test: TestOption = None,
    outside: OutsideOption = None,
    kind: KindOption = None,
    columns: ColumnsOption = "",
    scheme: SchemeOption = None,
    multi: MultiOption = None,
    vectors: Annotated[
        bool, typer.Option(help="Also look at vectors: near-duplicates, and labels that look wrong.")
    ] = True,
    bundle: BundleOption = None,
    store: StoreOption = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Look at labelled phrases before anything is trained on them. Exit status 1 where a head would be refused."""
    with extra("heads"):
        from nlu.heads import check as checks
        from nlu.heads import config as configs
        from nlu.heads.data import read
        from nlu.heads.material import encode
    chosen = configs.load(
        config, name=None if config else "unnamed", kind=kind, files=_files(data, dev, test, outside),
        columns=_columns(columns), scheme=scheme, multi=multi,
    )  # fmt: skip
    vectorizer = _vectorizer(bundle)
    dataset = read(chosen, uncased=vectorizer.spec.uncased)
    findings = [*dataset.findings, *checks.texts(dataset, chosen)]
    if vectors and not any(finding.severity == "error" for finding in findings):
        with extra("heads"), Bar() as track, closing(_store(store, vectorizer, track)) as known:
            findings += checks.vectors(encode(dataset, known, tokens=False), chosen)
    counts = {split: len(dataset.split(split)) for split in ("train", "dev", "test")}
    bad = any(finding.severity == "error" for finding in findings)
    if as_json:
        print_json(
            {"rows": counts, "findings": [finding._asdict() for finding in findings], "trainable": not bad}
        )
    else:
        _show_findings(findings)
        shown = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
        out.print(
            f"{shown or 'no'} rows; {'found errors: mend them first' if bad else 'a head can be trained on this'}"
        )
    raise typer.Exit(1 if bad else 0)


@app.command()
def train(
    out_folder: Annotated[
        Path, typer.Option("--out", help="Where head.NAME, report.html and report.json go.")
    ],
    config: ConfigArgument = None,
    name: Annotated[str | None, typer.Option(help="The head's name.")] = None,
    data: DataOption = None,
    dev: DevOption = None,
    test: TestOption = None,
    outside: OutsideOption = None,
    kind: KindOption = None,
    task: Annotated[str | None, typer.Option(help="What it is about, e.g. intent.")] = None,
    columns: ColumnsOption = "",
    scheme: SchemeOption = None,
    multi: MultiOption = None,
    balanced: Annotated[
        bool | None, typer.Option("--balanced", help="Rare labels count as much as frequent ones.")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Units of a hidden layer, instead of a linear head.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Thresholds are best for F-beta; above 1 prefers recall.")
    ] = None,
    outside_from: Annotated[
        Literal["given", "labels", "none"] | None,
        typer.Option(help="What out-of-scope learns from: given phrases, or labels left out in turn."),
    ] = None,
    turns: Annotated[
        int | None, typer.Option(help="Of kind context: how many earlier turns it sees.")
    ] = None,
    skip_bad: Annotated[
        bool | None,
        typer.Option("--skip-bad", help="Leave rows out that cannot be read, instead of training nothing."),
    ] = None,
    shots: Annotated[str, typer.Option(help="Also measure with so many phrases a label, e.g. 5,10.")] = "",
    seeds: Annotated[int | None, typer.Option(help="Draws of each number of phrases.")] = None,
    cross_validate: Annotated[
        int | None, typer.Option(help="Folds of a cross-validation over train.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of folds and draws.")] = None,
    bundle: BundleOption = None,
    store: StoreOption = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Train a head on labelled phrases, without torch, and write its report."""
    one_blas_thread()
    with extra("heads"):
        from nlu.heads import config as configs
        from nlu.heads.train import PAGE
        from nlu.heads.train import train as run
    chosen = configs.load(
        config, name=name if name or config else out_folder.resolve().name, kind=kind, task=task, files=_files(data, dev, test, outside),
        columns=_columns(columns), scheme=scheme, multi=multi, balanced=balanced, hidden=hidden, beta=beta, outside=outside_from,
        turns=turns, shots=_numbers("--shots", shots), shot_seeds=seeds, cross_validate=cross_validate, seed=seed, skip_bad=skip_bad,
    )  # fmt: skip
    with extra("heads"), Bar() as track:
        trained = run(
            chosen,
            _vectorizer(bundle),
            store,
            out_folder,
            workers=settings_for().workers,
            progress=track.step,
        )
    if as_json:
        print_json(trained.report)
        return
    _show_findings([finding for finding in trained.findings if finding.severity != "note"])
    _show_report(trained.report)
    seconds, named = trained.report["seconds"], trained.folder
    size = f"{trained.report['head']['bytes']:,} bytes in {seconds['total']:.1f} s"
    out.print(f"{named}: {size}; {out_folder / PAGE} tells all", markup=False)
    out.print(Text(f"next: nlu heads add {out_folder} --out BUNDLE, or nlu heads replace", style="dim"))


@app.command()
def compare(
    before: Annotated[
        str, typer.Argument(help="A head's folder, what `train` wrote, or NAME for the bundle's own head.")
    ],
    after: Annotated[str, typer.Argument(help="Another; what changes from the first to this one is shown.")],
    data: DataOption = None,
    traffic: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Phrases without labels, one a line.")
    ] = None,
    columns: ColumnsOption = "",
    bundle: BundleOption = None,
    store: StoreOption = Path(".cache/vectors"),
    show: Annotated[int, typer.Option(help="How many flips are shown.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Put two heads side by side: measures on labelled rows, and every phrase they answer differently."""
    with extra("heads"):
        from nlu.heads import compare as comparing
    if (data is None) == (traffic is None):
        given = "both --data and --traffic" if data else "neither --data nor --traffic"
        raise typer.BadParameter(f"found {given}, expected one of them")
    first, second = _head(before, bundle), _head(after, bundle)
    comparing.check(first, second)
    rows = _material(first, data or [traffic], columns, bundle, store, labelled=data is not None)
    found = comparing.compare(first, second, rows, labelled=data is not None).as_dict()
    if as_json:
        print_json(found)
        return
    if found["measures"]:
        table = _table("", before, after, "change, 95 %")
        for name, measure in found["measures"].items():
            interval = f"{measure['change_low']:+.3f} to {measure['change_high']:+.3f}"
            table.add_row(
                name.replace("_", " "), f"{measure['before']:.3f}", f"{measure['after']:.3f}", interval
            )
        out.print(table)
    out.print(f"{len(found['flips'])} of {found['phrases']} phrases are answered differently")
    for pair in found["by_pair"][:show]:
        out.print(Text(f"{pair['count']:>6}  {pair['before']} -> {pair['after']}", style="bold"))
        changed = (pair["before"], pair["after"])
        for flip in [each for each in found["flips"] if (each["before"], each["after"]) == changed][:3]:
            gold = f"   ({flip['gold']})" if flip["gold"] else ""
            out.print(Text(f"        {flip['phrase']}{gold}", style="dim"))


@app.command()
def suggest(
    pool: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Phrases without labels, one a line.")
    ],
    head: Annotated[
        str, typer.Option(help="A head's folder, what `train` wrote, or NAME for the bundle's own head.")
    ] = "intent",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many phrases.")] = 50,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="A TSV to label: text, and what the head would say.")
    ] = None,
    bundle: BundleOption = None,
    store: StoreOption = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Pick the phrases of a pool that are most worth labelling next."""
    with extra("heads"):
        from nlu.heads import suggest as suggesting
    asked = _head(head, bundle)
    rows = _material(asked, [pool], "", bundle, store, labelled=False)
    found = suggesting.suggest(asked, rows, count)
    if out_file is not None:
        lines = [
            "text\tguess\trunner_up\tuncertainty",
            *(f"{s.phrase}\t{s.guess}\t{s.runner_up}\t{s.uncertainty:.3f}" for s in found),
        ]
        out_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if as_json:
        print_json({"pool": len(rows), "suggestions": [each._asdict() for each in found]})
        return
    table = _table("unsure", "phrase", "guess", "or")
    for each in found:
        table.add_row(f"{each.uncertainty:.2f}", *map(Text, (each.phrase, each.guess, each.runner_up)))
    out.print(table)
    there = f" in {out_file}; label them in a column label" if out_file else ""
    out.print(f"{len(found)} of {len(rows)} phrases{there}", markup=False)


def _head(named: str, bundle: Path | None) -> Any:
    """A head by its folder, by the folder that `train` wrote, or by its name in the bundle."""
    from annotators import table
    from nlu.heads import lifecycle

    if Path(named).exists():
        return table.load(lifecycle.find(Path(named)).folder)
    held = verified(bundle)
    return table.load(held.folder(held.component("head", named)))


def _material(
    head: Any, files: list[Any], columns: str, bundle: Path | None, store: Path, *, labelled: bool
) -> Any:
    """Rows with vectors of the bundle's vectorizer, which must be the head's. Raises ValueError where it is not."""
    from nlu.heads import config as configs
    from nlu.heads.data import read
    from nlu.heads.material import encode

    vectorizer = _vectorizer(bundle)
    wanted = head.spec.requires.vectorizer
    if wanted != vectorizer.fingerprint:
        raise ValueError(
            f"head {head.spec.name}: found one trained on vectorizer {wanted[:12]}, expected {vectorizer.fingerprint[:12]}, the bundle's; "
            "retrain it, or name its bundle with --bundle"
        )
    spec = head.spec
    kind = spec.kind if labelled and spec.kind != "rules" else "sentence"
    chosen = configs.load(
        None, name=spec.name, kind=kind, files={"test" if labelled else "outside": files}, columns=_columns(columns),
        multi=(labelled and not spec.exclusive) or None,
        scheme="restore" if kind == "token" and spec.params.get("restores") else None,
    )  # fmt: skip
    dataset = read(chosen, uncased=vectorizer.spec.uncased)
    _readable(dataset, needed=labelled)
    with Bar() as track, closing(_store(store, vectorizer, track)) as known:
        materials = encode(dataset, known, tokens=spec.kind == "token")
    rows = (materials.test if labelled else materials.outside).joined(materials.outside_test)
    if not len(rows):
        named = ", ".join(map(str, files))
        raise ValueError(
            f"{named}: found no phrases to ask, expected some, of split test where rows have one; check the file"
        )
    return rows


def _readable(dataset: Dataset, *, needed: bool) -> None:
    """Bad rows: of labelled ones each is needed, of traffic they are left out. Raises ValueError."""
    bad = dataset.findings
    if not bad:
        return
    said = f"{bad[0].where}: {bad[0].what}: found {bad[0].found}; {bad[0].remedy}"
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    if needed:
        raise ValueError(said + more)
    err.print(Text(f"left out: {said}{more}", style="yellow"))


def _table(*headings: str) -> Table:
    return Table(*map(escape, headings), box=None, pad_edge=False, header_style="dim")


def _show_report(report: dict[str, Any]) -> None:
    """The summary, and the labels that need a look."""
    from nlu.heads.verdict import value_of

    summary = report.get("summary", {})
    if not summary:
        out.print("nothing was measured: there is no test split")
        return
    table = _table(f"measured on {report.get('measured_on', 'its tests')}", "", "95 %")
    outside = report.get("outside") or {}
    strange = {f"out of scope: {name}": outside[name] for name in ("auroc", "recall", "false_alarms") if name in outside}  # fmt: skip
    for measure, found in (summary | strange).items():
        value, interval = found, ""
        if isinstance(found, dict):
            value, interval = found["value"], f"{found['low']:.3f} to {found['high']:.3f}"
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(measure.replace("_", " "), shown, interval)
    out.print(table)
    classes = sorted(report.get("classes", ()), key=lambda row: value_of(row["f1"]))
    worst = [f"{row['label']} {value_of(row['f1']):.2f}" for row in classes if row["support"]]
    if len(worst) > 5:
        out.print(Text(f"weakest labels by F1: {', '.join(worst[:5])}", style="dim"))


def _show_findings(findings: list[Finding]) -> None:
    for finding in findings:
        out.print(
            Text(f"{finding.severity:<8}", style=_MARKS[finding.severity]),
            Text(f"{finding.what}: ", style="bold").append(f"{finding.found}", style="not bold"),
        )
        out.print(Text(f"         {finding.where}", style="dim"))
        out.print(Text(f"         -> {finding.remedy}", style="dim"))


def _files(
    data: list[Path] | None, dev: list[Path] | None, test: list[Path] | None, outside: list[Path] | None
) -> dict[str, list[Path]]:
    """Only what was named, so that a config's own files stay."""
    named = {"train": data, "dev": dev, "test": test, "outside": outside}
    return {split: paths for split, paths in named.items() if paths}


def _columns(text: str) -> dict[str, str] | None:
    if not text:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not ours or not theirs for ours, _, theirs in pairs):
        raise typer.BadParameter(f"--columns {text!r}: expected pairs such as text=utterance,label=intent")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _numbers(option: str, text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r}: expected numbers such as 5,10") from error


def _vectorizer(bundle: Path | None) -> Any:
    from nlu.vectorizer import Vectorizer

    return Vectorizer(vectorizer_folder(bundle))


def _store(folder: Path, vectorizer: Any, track: Bar) -> Any:
    from nlu.vector_store import VectorStore

    return VectorStore(
        folder, vectorizer, os.cpu_count() or 1, lambda done, total: track.step("encoding", done, total)
    )
