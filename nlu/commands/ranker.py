"""`nlu index train-ranker`: learn from dialogs which of the replies found is to be said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

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
from nlu.progress import Bar

_SHOWN = 12  # features


def train_ranker(
    dialogs: Annotated[
        list[Path],
        typer.Argument(
            exists=True, dir_okay=False, help='Lines of {"id", "turns": [{"speaker", "text"}, ...]}, .gz too.'
        ),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="Where the ranker goes, a folder called ranker.NAME.")
    ],
    bundle: BundleOption = None,
    candidates: Annotated[
        int, typer.Option(min=2, help="Replies beside each other: the true one and others.")
    ] = 100,
    context: Annotated[int, typer.Option(min=0, help="Turns before the query that are looked at.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of candidates, of trees and of intervals.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many exchanges, of dialogs drawn by seed.")
    ] = None,
    store: Annotated[
        Path, typer.Option(help="Vectors are kept here, so that a second run need not encode.")
    ] = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Train a ranker of trees on dialogs, without torch, and measure it on dialogs it has not seen."""
    one_blas_thread()
    with extra("heads"):
        from nlu.retrieval import train_ranker as training
    kind, _, name = out_folder.name.partition(".")
    if kind != "ranker" or not name:
        raise typer.BadParameter(f"--out: found {out_folder.name!r}, expected a folder called ranker.NAME")
    wanted = training.Wanted(candidates=candidates, context=context, seed=seed, limit=limit)
    with extra("heads"), Bar() as track:
        trained = training.train(
            dialogs,
            load(bundle),
            store,
            out_folder,
            wanted,
            workers=settings_for().workers,
            progress=track.step,
        )
    if as_json:
        print_json(trained.report)
        return
    _show(trained.report)
    out.print(
        f"{out_folder}: {trained.report['ranker']['trees']} trees; {training.report_file(out_folder)} tells all",
        markup=False,
    )
    out.print(Text("next: put it into a bundle with `nlu heads add`", style="dim"))


def _show(report: dict[str, Any]) -> None:
    """Every ranker on the test dialogs, and what the trees go by."""
    for exam, what in (("among", "at random"), ("among_found", "that were found")):
        if report[exam]["contestants"]:
            out.print(_ranking(report[exam], what))
            out.print()
    table = Table("feature", "share of the gain", box=None, pad_edge=False, header_style="dim")
    for name, gain in [*report["features"].items()][:_SHOWN]:
        table.add_row(Text(name), f"{gain:.3f}")
    out.print(table)


def _ranking(exam: dict[str, Any], what: str) -> Table:
    """A line for each measure; of each ranker its value, and its gain over cosine with the 95 % interval."""
    rankers = exam["contestants"]
    (first, basis), *others = rankers.items()
    heads = [heading for name, _ in others for heading in (name, f"over {first}, 95 %")]
    table = Table(
        f"{exam['exchanges']:,} true replies among {exam['of']} {what}", first, *heads,
        box=None, pad_edge=False, header_style="dim",
    )  # fmt: skip
    for measure, value in basis["measures"].items():
        cells = []
        for _, found in others:
            gain = found["gain"][measure]
            cells.append(f"{found['measures'][measure]['value']:.3f}")
            cells.append(f"{gain['value']:+.3f} [{gain['low']:+.3f} {gain['high']:+.3f}]")
        table.add_row(measure, f"{value['value']:.3f}", *cells)
    return table
