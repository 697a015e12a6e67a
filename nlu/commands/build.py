"""`nlu index build | add | remove | block`: replies from files, and changes that leave most of an index alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from nlu.commands.options import (
    BundleOption,
    JsonOption,
    one_blas_thread,
    out,
    print_json,
    settings_for,
    verified,
)
from nlu.progress import Bar

if TYPE_CHECKING:
    from index.layout import Layout
    from nlu.retrieval.build import Built
    from nlu.retrieval.quantiles import Quantiles
    from nlu.retrieval.reading import Models

Files = Mapping[str, tuple[int, str]]

RepliesArgument = Annotated[
    Path,
    typer.Argument(
        exists=True, dir_okay=False, help="Rows of prompt and reply: .tsv, .jsonl (.gz too) or .parquet."
    ),
]
IndexArgument = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A part index.NAME.")]
IdsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Of replies.")]
FromOption = Annotated[
    Path | None, typer.Option("--from", exists=True, dir_okay=False, help="A file of ids, one a line.")
]
MissingOption = Annotated[
    bool, typer.Option("--missing-ok", help="Ids that the index does not have are no error.")
]
ChangedOption = Annotated[
    Path | None, typer.Option("--out", help="Where the changed index goes. Default: in place.")
]
EncodeOption = Annotated[
    Literal["prompts", "replies", "both"], typer.Option(help="What a reply is found by.")
]
ToxicityOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="A reply that is toxic with this score or more is blocked.")
]
BannedOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Ids or texts that are blocked, one a line."),
]
ReportOption = Annotated[
    Path | None, typer.Option(help="Where merges.jsonl and blocked.jsonl go. Default: beside the index.")
]
StoreOption = Annotated[
    Path, typer.Option(help="Vectors are kept here, so that only new phrases are ever encoded.")
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Threads that encode. Default: all cores.")]
EmptyOption = Annotated[bool, typer.Option("--allow-empty", help="No replies are no error.")]
_STORE = Path(".cache/vectors")
_SCANNED_SHARE = 0.05  # of the rows: beyond, a graph should be linked anew
_TOXIC_SHARE = 0.05  # of what authors wrote: beyond, the head is more likely wrong than they are


def build(
    replies: RepliesArgument,
    out_folder: Annotated[Path, typer.Option("--out", help="Where the index goes, a folder index.NAME.")],
    bundle: BundleOption = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="At most so many files of vectors, alike in size.")
    ] = None,
    shard_rows: Annotated[
        int, typer.Option(min=8, help="Vectors of a file, without --shards; a multiple of 8.")
    ] = 65536,
    kind: Annotated[
        Literal["exact", "hnsw", "auto"], typer.Option(help="Scan, walk a graph, or a graph where it pays.")
    ] = "auto",
    encode: EncodeOption = "prompts",
    merge: Annotated[
        Literal["same", "near", "off"],
        typer.Option(help="Replies that become one: of the same words, of nearly the same, or none."),
    ] = "same",
    quantile_report: Annotated[
        bool, typer.Option("--quantile-report", help="How close together the index lies.")
    ] = False,
    max_toxicity: ToxicityOption = 0.5,
    banned: BannedOption = None,
    personas: Annotated[str | None, typer.Option(help="Names, a,b. Default: those of the file.")] = None,
    surfaces: Annotated[str | None, typer.Option(help="Names, a,b. Default: those of the file.")] = None,
    report: ReportOption = None,
    store: StoreOption = _STORE,
    workers: WorkersOption = None,
    allow_empty: EmptyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make an index of a file of replies."""
    one_blas_thread()
    from index.replies import Replies
    from nlu.retrieval import build as story
    from nlu.retrieval.quantiles import quantiles

    wanted = story.Wanted(
        encode=encode, merge=merge, kind=kind, shards=shards, shard_rows=shard_rows, max_toxicity=max_toxicity,
        banned=_lines(banned), personas=_names(personas), surfaces=_names(surfaces), allow_empty=allow_empty,
    )  # fmt: skip
    before = story.files(out_folder)
    with Bar() as track, _models(bundle, store, workers) as models:
        built = story.build(
            replies, out_folder, models, wanted, report=report or out_folder.parent, progress=track.step
        )
        found = None
        if quantile_report:
            found = quantiles(
                Replies.load(out_folder),
                progress=lambda done, total: track.step("looking how close it lies", done, total),
            )
        told = _told(out_folder, built, models, before, report)
    if found is not None:
        told["quantiles"] = found._asdict()
    if as_json:
        print_json(told)
        return
    _show_built(told)
    if found is not None:
        _show_quantiles(found)
    _show_pull(told)
    hint = f"next: nlu heads replace {out_folder} --out BUNDLE, or add where the bundle has none of that name"
    out.print(hint, style="dim", soft_wrap=True)


def add(
    index: IndexArgument,
    replies: RepliesArgument,
    out_folder: ChangedOption = None,
    bundle: BundleOption = None,
    encode: EncodeOption = "prompts",
    max_toxicity: ToxicityOption = 0.5,
    banned: BannedOption = None,
    report: ReportOption = None,
    store: StoreOption = _STORE,
    workers: WorkersOption = None,
    allow_empty: EmptyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add replies, or prompts of replies that are there; files of vectors that are full keep their bytes."""
    one_blas_thread()
    from nlu.retrieval import build as story

    wanted = story.Wanted(
        encode=encode, max_toxicity=max_toxicity, banned=_lines(banned), allow_empty=allow_empty
    )
    target = out_folder or index
    before = story.files(index)
    with Bar() as track, _models(bundle, store, workers) as models:
        built = story.add(
            index, replies, target, models, wanted, report=report or target.parent, progress=track.step
        )
        told = _told(target, built, models, before, report)
    if as_json:
        print_json(told)
        return
    _show_built(told)
    _show_pull(told)


def remove(
    index: IndexArgument,
    ids: IdsArgument = None,
    from_file: FromOption = None,
    missing_ok: MissingOption = False,
    out_folder: ChangedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take replies out; their vectors stay, unfindable, until the index is built anew."""
    from index import change

    _change("removed", index, ids, from_file, missing_ok, out_folder, as_json, change.remove)


def block(
    index: IndexArgument,
    why: Annotated[str, typer.Option(help='Why they must not be said; "" lets them be said again.')],
    ids: IdsArgument = None,
    from_file: FromOption = None,
    missing_ok: MissingOption = False,
    out_folder: ChangedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep replies from ever being said; they stay in the index."""
    from index import change

    def blocked(folder: Path, target: Path, names: Sequence[str]) -> Layout:
        return change.block(folder, target, names, why.strip())

    done = "blocked" if why.strip() else "allowed"
    _change(done, index, ids, from_file, missing_ok, out_folder, as_json, blocked)


def _change(
    done: str,
    index: Path,
    ids: list[str] | None,
    from_file: Path | None,
    missing_ok: bool,
    out_folder: Path | None,
    as_json: bool,
    change: Any,
) -> None:
    """What `remove` and `block` have in common."""
    from nlu.retrieval import build as story

    target = out_folder or index
    story.check_name(target)
    story.sweep(target)
    wanted = list(
        dict.fromkeys([*(ids or ()), *(line.strip() for line in _lines(from_file) if line.strip())])
    )
    if not wanted:
        raise typer.BadParameter("found no ids, expected some; name them, or a file of them with --from")
    layout, items = story.opened(index)
    known = [name for name in wanted if items.rows_of(name)]
    missing = [name for name in wanted if name not in set(known)]
    before = story.files(index)
    layout = change(index, target, known if missing_ok else wanted)
    told = {
        "folder": str(target),
        done: known,
        "missing": missing,
        **_sizes(target, layout, before),
    }
    if as_json:
        print_json(told)
        return
    unknown = f", {len(missing)} were not there" if missing else ""
    out.print(f"{target}: {len(known)} replies {done}{unknown}; {layout.items} rows", soft_wrap=True)
    _show_pull(told)


@contextmanager
def _models(bundle: Path | None, store: Path, workers: int | None) -> Iterator[Models]:
    """The vectorizer and the heads of a bundle; a vectorizer's own folder has none."""
    from annotators import table
    from nlu.retrieval.judge import Judge
    from nlu.retrieval.reading import Models
    from nlu.vector_store import VectorStore
    from nlu.vectorizer import Vectorizer

    if bundle is not None and (bundle / "vectorizer.json").exists():
        vectorizer, heads = Vectorizer(bundle), []
    else:
        found = verified(bundle)
        vectorizer = Vectorizer(found.folder(found.of_kind("vectorizer")[0]))
        heads = [table.load(found.folder(component)) for component in found.of_kind("head")]
    threads = workers or settings_for().workers
    with closing(VectorStore(store, vectorizer, threads, lambda done, total: None)) as vectors:
        yield Models(vectorizer, vectors, Judge(heads, vectorizer.fingerprint))


def _told(folder: Path, built: Built, models: Models, before: Files, report: Path | None) -> dict[str, Any]:
    """What was done, ready for JSON."""
    return {
        "folder": str(folder),
        "rows": built.rows,
        "replies": built.replies,
        "entries": built.entries,
        "merged": built.merged,
        "blocked": {"toxic": built.toxic if built.judged else None, "banned": built.banned},
        "banned_in_vain": list(built.unmatched),
        "report": str(report or folder.parent),
        "heads": [head.spec.name for head in models.judge.heads],
        "vectorizer": models.vectorizer.fingerprint,
        "encoded": models.store.encoded,
        **_sizes(folder, built.layout, before),
    }


def _sizes(folder: Path, layout: Layout, before: Files) -> dict[str, Any]:
    from nlu.retrieval.build import files, pulled

    after = files(folder)
    fetched = pulled(before, after)
    scanned = 0 if layout.graph is None else layout.rows - layout.graph.rows
    return {
        "index": {
            "kind": layout.kind,
            "entries": layout.items,
            "vectors": layout.rows,
            "texts": layout.said_rows,
            "shards": len(layout.shards) + len(layout.said),
            "personas": list(layout.personas),
            "surfaces": list(layout.surfaces),
            "bytes": sum(size for size, _ in after.values()),
            "not_in_graph": scanned,
        },
        "pull": fetched,
        "bytes_to_pull": sum(fetched.values()),
        "build_again": scanned > _SCANNED_SHARE * layout.rows,
    }


def _show_built(told: dict[str, Any]) -> None:
    index, blocked = told["index"], told["blocked"]
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    rows = [
        ("rows read", f"{told['rows']:,}"),
        ("new replies", f"{told['replies']:,}"),
        ("new pairs of prompt and reply", f"{told['entries']:,}"),
        ("texts merged into others", f"{told['merged']:,}"),
        ("blocked as toxic", "not judged" if blocked["toxic"] is None else f"{blocked['toxic']:,}"),
        ("blocked as banned", f"{blocked['banned']:,}"),
        ("phrases encoded anew", f"{told['encoded']:,}"),
    ]
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    out.print(table)
    if blocked["toxic"] is None:
        out.print(Text("no toxicity head in this bundle: nobody looked at what replies say", style="yellow"))
    elif blocked["toxic"] > _TOXIC_SHARE * told["replies"]:
        share = blocked["toxic"] / told["replies"]
        out.print(
            Text(
                f"{share:.0%} blocked as toxic: the head may not know this language; look at blocked.jsonl, and raise"
                " --max-toxicity or teach the head",
                style="yellow",
            )
        )
    vain = told["banned_in_vain"]
    if vain:
        more = f" (and {len(vain) - 5} more)" if len(vain) > 5 else ""
        out.print(Text(f"banned, but no reply: {'; '.join(vain[:5])}{more}", style="yellow"))
    out.print(
        f"{told['folder']}: {index['kind']}, {index['entries']:,} rows on {index['vectors']:,} vectors in "
        f"{index['shards']} shards, {index['bytes']:,} bytes; merges.jsonl and blocked.jsonl in {told['report']}",
        soft_wrap=True,
    )


def _show_quantiles(found: Quantiles) -> None:
    """The two tables as one."""
    columns = [f"{float(name):.0%}" for name in found.other or found.own]
    table = Table("similarity at", *columns, box=None, pad_edge=False, header_style="dim")
    for name, row in (("nearest of another reply", found.other), ("prompt to its reply", found.own)):
        if row:
            table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    out.print(table)
    out.print(f"over {found.rows:,} rows", style="dim")


def _show_pull(told: dict[str, Any]) -> None:
    """What a pod that holds the folder as it was would fetch."""
    table = Table("a pull fetches", "bytes", box=None, pad_edge=False, header_style="dim")
    for name, size in told["pull"].items():
        table.add_row(name, f"{size:,}")
    table.add_row("in all", f"{told['bytes_to_pull']:,}")
    out.print(table)
    if told["build_again"]:
        left = told["index"]["not_in_graph"]
        out.print(
            Text(
                f"{left:,} vectors are not in the graph and are scanned: build the index again",
                style="yellow",
            )
        )


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found {error.reason}, expected UTF-8 text; save it as UTF-8") from error


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
