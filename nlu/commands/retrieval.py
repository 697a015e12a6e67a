"""`nlu index evaluate`: how well replies are found and ranked, by dialogs that nothing was learnt from."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nlu.commands.options import (
    BundleOption,
    JsonOption,
    extra,
    load,
    one_blas_thread,
    out,
    print_json,
    settings_for,
)
from nlu.progress import Bar, err

if TYPE_CHECKING:
    from nlu.engine import Engine

_SHOWN_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)


def evaluate(
    dialogs: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            dir_okay=False,
            help='Lines of {"id", "turns": [{"speaker", "text"}, ...]}, .gz too; none of them learnt from.',
        ),
    ],
    bundle: BundleOption = None,
    index: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Instead of the bundle's index.")
    ] = None,
    ranker: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Instead of the bundle's ranker.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Instead of the bundle's adapter.")
    ] = None,
    of: Annotated[int, typer.Option(min=2, help="Candidates: the true reply and others.")] = 100,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many exchanges, of dialogs drawn by seed.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Turns before the query that are looked at.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of candidates, of dialogs and of intervals.")] = 0,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Where report.json and report.html go.")
    ] = None,
    store: Annotated[
        Path, typer.Option(help="Vectors are kept here, so that a second run need not encode.")
    ] = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Measure how well true replies are found and ranked, and how much of the dialogs the index covers."""
    one_blas_thread()
    from nlu.retrieval import evaluate as judging
    from nlu.retrieval.dialogs import Skipped, read
    from nlu.vector_store import VectorStore

    engine = _replaced(load(bundle), index, ranker, adapter)
    skipped: list[Skipped] = []
    exchanges = list(
        read(dialogs, uncased=engine.vectorizer.spec.uncased, context=context + 1, skip=skipped.append)
    )
    if skipped:
        err.print(
            f"skipped {len(skipped)} turns, the first at {skipped[0].where}: {skipped[0].why}",
            soft_wrap=True,
            markup=False,
        )
    chosen = exchanges if limit is None else judging.draw(exchanges, limit, seed)
    settings = settings_for()
    with (
        Bar() as track,
        closing(
            VectorStore(
                store,
                engine.vectorizer,
                settings.workers,
                lambda done, total: track.step("encoding", done, total),
            )
        ) as vectors,
    ):
        report = {
            "dialogs_from": [str(path) for path in dialogs],
            "vectorizer": engine.vectorizer.fingerprint,
            "bundle": engine.versions.bundle,
            "context": context,
            "seed": seed,
            "skipped_turns": len(skipped),
            **judging.evaluate(
                chosen, engine, vectors, of=of, seed=seed, persona=settings.persona, progress=track.step
            ),
        }
    if out_folder is not None:
        with extra("heads"):
            from nlu.retrieval import page
        page.write(report, out_folder)
    if as_json:
        print_json(report)
        return
    _show(report)
    if out_folder is not None:
        out.print(f"{out_folder / page.PAGE} tells all", markup=False)


def _replaced(engine: Engine, index: Path | None, ranker: Path | None, adapter: Path | None) -> Engine:
    """The engine with the parts that were named; raises EngineRefused, IndexInvalid or AdapterInvalid."""
    from index.adapter import Adapter
    from nlu import canaries, loading
    from nlu.ranker import Ranker

    for kind, folder in (("index", index), ("adapter", adapter), ("ranker", ranker)):
        # Weights written by hand belong to no vectorizer.
        if folder is not None and (kind != "ranker" or canaries.made_for(folder) is not None):
            canaries.check(f"{kind} {folder}", folder, engine.vectorizer)
    if index is not None:
        found = loading.load_replies(index, milvus=settings_for().milvus)
        engine = replace(engine, replies=found)
    if adapter is not None:
        engine = replace(engine, adapter=Adapter.load(adapter))
    if ranker is not None:
        checked = loading.checked_ranker(Ranker.load(ranker), engine.fleet, engine.vectorizer)
        engine = replace(engine, ranker=checked)
    return engine


def _show(report: dict[str, Any]) -> None:
    out.print(
        f"{report['exchanges']:,} exchanges of {report['dialogs']:,} dialogs, {report['replies']:,} different replies"
    )
    for key in ("among", "among_all"):
        out.print()
        out.print(_ranking(report[key], "all " if key == "among_all" else ""))
    if "coverage" in report:
        out.print()
        out.print(_coverage(report["coverage"]))
    latency = report["latency"]
    out.print()
    table = Table("microseconds", "p50", "p95", "p99", box=None, pad_edge=False, header_style="dim")
    for name, percentiles in latency["us"].items():
        table.add_row(name, *(f"{percentiles[f'p{cut}']:,.0f}" for cut in (50, 95, 99)))
    out.print(table)
    out.print(
        f"one turn at a time, {latency['rows']:,} rows of {latency['index']}, as observed on this machine",
        style="dim",
    )


def _ranking(found: dict[str, Any], which: str) -> Table:
    """A line for each measure of each contestant, and what it gains over the first one."""
    first = next(iter(found["contestants"]))
    head = (f"among {which}{found['of']:,}", "", "", "95 %", f"over {first}", "95 %")
    table = Table(*head, box=None, pad_edge=False, header_style="dim")
    for name, contestant in found["contestants"].items():
        for row, (measure, value) in enumerate(contestant["measures"].items()):
            gain = contestant.get("gain", {}).get(measure)
            told = ("", "") if gain is None else _told(gain, "+.3f")
            table.add_row("" if row else name, measure, *_told(value, ".3f"), *told)
    return table


def _told(estimate: dict[str, float], kind: str) -> tuple[str, str]:
    low, high = (f"{estimate[end]:{kind}}" for end in ("low", "high"))
    return f"{estimate['value']:{kind}}", f"{low} to {high}"


def _coverage(found: dict[str, Any]) -> Table:
    head = ("best reply at least", "turns covered", f"right, of {found['known']:,} the index could know")
    table = Table(*head, box=None, pad_edge=False, header_style="dim")
    for point in found["curve"]:
        if point["quantile"] in _SHOWN_QUANTILES:
            precision = "" if point["precision"] is None else f"{point['precision']:.3f}"
            table.add_row(f"{point['threshold']:.3f}", f"{point['coverage']:.3f}", precision)
    return table
