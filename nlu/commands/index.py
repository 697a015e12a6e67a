"""`nlu index`: replies and how they are found; here, teaching queries where new replies stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nlu.commands.build import add, block, build, remove
from nlu.commands.milvus import push
from nlu.commands.options import (
    BundleOption,
    JsonOption,
    extra,
    one_blas_thread,
    out,
    print_json,
    settings_for,
    verified,
)
from nlu.commands.ranker import train_ranker
from nlu.commands.retrieval import evaluate
from nlu.progress import Bar

if TYPE_CHECKING:
    from index.adapter import Spec

app = typer.Typer(no_args_is_help=True, help="Replies, and how they are found.")
for command in (build, add, remove, block):
    app.command()(command)
app.command()(evaluate)
app.command()(push)
app.command("train-ranker")(train_ranker)


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def adapt(
    pairs: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="Lines of query<TAB>reply id, several queries for each reply."
        ),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="Where the adapter goes, a folder called adapter.NAME.")
    ],
    bundle: BundleOption = None,
    rank: Annotated[int, typer.Option(min=1, help="Directions in which queries may move.")] = 16,
    eps: Annotated[
        float, typer.Option(help="How far a query may move, 0 to 1; about as far as any similarity can.")
    ] = 0.3,
    max_harm: Annotated[
        float, typer.Option(min=0.0, help="Recall that old content may lose, 0.01 being one in a hundred.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Of the first weights and of the intervals.")] = 0,
    store: Annotated[
        Path, typer.Option(help="Vectors are kept here, so that a second run need not encode.")
    ] = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Learn an adapter: new phrases find their replies, old phrases keep theirs, the vectorizer stays."""
    one_blas_thread()
    import numpy as np

    from nlu import canaries
    from nlu.vector_store import VectorStore
    from nlu.vectorizer import Vectorizer

    with extra("heads"):
        from nlu.heads import adapt as training
        from nlu.heads import questions
    if not 0 < eps < 1:
        raise typer.BadParameter(f"--eps: found {eps}, expected more than 0 and less than 1")
    kind, _, name = out_folder.name.partition(".")
    if kind != "adapter" or not name:
        raise typer.BadParameter(f"--out: found {out_folder.name!r}, expected a folder called adapter.NAME")
    base = verified(bundle)
    if not base.of_kind("index"):
        raise ValueError(f"{base.path}: found no index, expected a bundle with replies; name another")
    vectorizer = Vectorizer(base.folder(base.of_kind("vectorizer")[0]))
    index = base.folder(base.of_kind("index")[0])
    canaries.check("index", index, vectorizer)
    with Bar() as track:
        vectors = VectorStore(
            store, vectorizer, settings_for().workers, lambda done, total: track.step("encoding", done, total)
        )
        library = questions.read_library(
            index,
            lambda phrases: np.stack(
                [encoding.sentence for encoding in vectors.encode(phrases, tokens=False)]
            ),
            uncased=vectorizer.spec.uncased,
        )
        adapter = training.adapt(
            questions.read_pairs(pairs, library),
            library,
            training.Wanted(rank=rank, eps=eps, max_harm=max_harm, seed=seed),
            fingerprint=vectorizer.fingerprint,
            progress=track.step,
        )
        vectors.close()
    adapter.save(out_folder)
    canaries.write(out_folder, vectorizer)
    if as_json:
        print_json({"folder": str(out_folder), **adapter.spec.model_dump(mode="json")})
    else:
        _show(out_folder, adapter.spec)


def _show(folder: Path, spec: Spec) -> None:
    """Before and after, on what was not learnt from."""
    table = Table(
        "held out", "n", "", "before", "after", "change", box=None, pad_edge=False, header_style="dim"
    )
    for name, exam in (("new content", spec.new), ("old content", spec.old)):
        measures = (("recall@1", exam.recall_at_1), ("recall@10", exam.recall_at_10), ("MRR", exam.mrr))
        for row, (measure, change) in enumerate(measures):
            told = f"{change.after - change.before:+.3f} [{change.low:+.3f} {change.high:+.3f}]"
            head = ("", "") if row else (name, str(exam.questions))
            table.add_row(*head, measure, f"{change.before:.3f}", f"{change.after:.3f}", told)
    out.print(table)
    if spec.new.mrr.low <= 0:
        out.print(
            "new content: no gain that is certain; write more phrases, or make them prompts of the index"
        )
    out.print(
        f"{folder}: rank {spec.rank}, eps {spec.eps:g} ({spec.factor:g} of what was learnt): no similarity moves by more "
        f"than {spec.bound:.3f}; judged on {spec.rows} rows; put it into a bundle with `nlu heads add`",
        soft_wrap=True,
    )
