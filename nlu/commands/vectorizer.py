"""`nlu vectorizer`: export, evaluate, train, distill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from nlu.commands.options import JsonOption, extra, out, print_json
from nlu.progress import Bar, Stages, err

if TYPE_CHECKING:
    from nlu.training.train import Finished

app = typer.Typer(no_args_is_help=True, help="Make and look at vectorizers.")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A folder, all-MiniLM-L6-v2, or a Hugging Face name.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the vectorizer folder goes.")],
    precision: Annotated[
        Literal["fp32", "int8"],
        typer.Option(help="int8 is a quarter of the size and about 3x faster on a CPU."),
    ] = "int8",
    word_bits: Annotated[
        Literal["4", "8"], typer.Option(help="Bits of a word vector's component in int8; 4 halve the table.")
    ] = "8",
    token_dim: Annotated[int, typer.Option(help="Width of token vectors.")] = 128,
    phrases: Annotated[
        Path | None, typer.Option(help="Gate phrases, one a line; default: the starter content.")
    ] = None,
    min_cosine: Annotated[float | None, typer.Option(help="Lower or raise the parity gate.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a sentence-transformers or Hugging Face encoder into a vectorizer folder, behind a parity gate."""
    from dataclasses import asdict, replace

    from nlu import content
    from nlu.vectorizer import fingerprint

    with extra("train"):
        from nlu.training.export import Gates
        from nlu.training.export import export as run
    gates = Gates()
    if min_cosine is not None:
        gates = replace(gates, fp32_min_cosine=min_cosine, int8_mean_cosine=min_cosine)
    said = content.load().phrases() if phrases is None else phrases.read_text(encoding="utf-8").splitlines()
    with err.status("loading") as status:
        parity = run(
            source,
            out_folder,
            precision=precision,
            phrases=said,
            word_bits=4 if word_bits == "4" else 8,
            token_dim=token_dim,
            gates=gates,
            progress=status.update,
        )
    found = {
        "folder": str(out_folder),
        "fingerprint": fingerprint(out_folder),
        "precision": precision,
        **asdict(parity),
    }
    if as_json:
        print_json(found)
    else:
        out.print(
            f"{out_folder}: {precision}, fingerprint {found['fingerprint'][:12]}, cosine to torch over {parity.phrases} phrases: "
            f"mean {parity.mean_cosine:.4f}, worst {parity.min_cosine:.4f}; alone and in a crowd the same bits"
        )


@app.command()
def evaluate(
    folders: Annotated[
        list[Path], typer.Argument(help="Vectorizer folders; the others are held against the first.")
    ],
    suite: Annotated[
        Literal["quick", "full"], typer.Option(help="A minute on small samples, or everything.")
    ] = "quick",
    data: Annotated[Path, typer.Option(help="The folder of public datasets.")] = Path("../shared/data"),
    out_folder: Annotated[Path, typer.Option("--out", help="Where evaluation.json, .md and .png go.")] = Path(
        "runs/evaluation"
    ),
    dims: Annotated[
        str, typer.Option(help="Also cut to these widths by PCA, e.g. 300,256,128; intents and STS alone.")
    ] = "",
    only: Annotated[str, typer.Option(help="Look at these sets alone, e.g. banking77,hint3.")] = "",
    store: Annotated[
        Path, typer.Option(help="Vectors are kept here, so that a second run need not encode.")
    ] = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Compare vectorizers side by side through light heads on frozen vectors."""
    with extra("train"):
        from nlu.training import report
        from nlu.training.config import Evaluate
        from nlu.training.evaluate import evaluate as judge
    try:
        widths = [int(width) for width in dims.split(",") if width.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"--dims {dims!r}: expected widths such as 300,256,128") from error
    names = [name.strip() for name in only.split(",") if name.strip()]
    with Bar() as track:
        found = judge(
            folders, data, Evaluate(suite=suite), dims=widths, only=names, store=store, progress=track.step
        )
    written = report.write(found, out_folder)
    if as_json:
        print_json(report.as_json(found))
    else:
        out.print(report.table(found))
        out.print(f"{', '.join(map(str, written))}: suite {found.suite}, {found.seconds:.0f} s")


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="An experiment, e.g. nlu/training/configs/multitask.toml."
        ),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; begin where there is none.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Steps in all, instead of the config's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a vectorizer, and export it; `horovodrun -np N nlu vectorizer train CONFIG` is the same on N ranks."""
    with extra("train"):
        from nlu.training.loop import Interrupted
        from nlu.training.train import train as run
    with Stages() as bar:
        try:
            finished = run(config, resume=resume, steps=steps, begun=bar.begun)
        except Interrupted as error:
            err.print(Text(f"nlu: {error}", style="red"))
            raise typer.Exit(1) from None
    _show_finished(finished, as_json)


@app.command()
def distill(
    config: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="An experiment with [distill], e.g. nlu/training/configs/student.toml.",
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from wherever it stopped; begin where there is nothing yet."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a smaller vectorizer that knows what a teacher knows, stage after stage, and export it."""
    with extra("train"):
        from nlu.training.distill import distill as run
        from nlu.training.loop import Interrupted
    with Stages() as bar:
        try:
            finished = run(config, resume=resume, begun=bar.begun, encoded=bar.encoded)
        except Interrupted as error:
            err.print(Text(f"nlu: {error}", style="red"))
            raise typer.Exit(1) from None
    _show_finished(finished, as_json)


def _show_finished(finished: Finished, as_json: bool) -> None:
    """What a training run ended in."""
    from dataclasses import asdict

    from nlu.vectorizer import fingerprint

    if finished.parity is None:  # another rank exported
        return
    found = {
        "folder": str(finished.folder),
        "vectorizer": str(finished.vectorizer),
        "fingerprint": fingerprint(finished.vectorizer),
        "steps": finished.steps,
        "evaluation": {name: {measure: value} for name, (measure, value) in finished.evaluation.items()},
        **asdict(finished.parity),
    }
    if as_json:
        print_json(found)
        return
    table = Table("held rows of", "", "", box=None, pad_edge=False, header_style="dim")
    for name, (measure, value) in finished.evaluation.items():
        table.add_row(name, measure, f"{value:.3f}")
    out.print(table)
    out.print(
        f"{finished.vectorizer}: fingerprint {found['fingerprint'][:12]} after {finished.steps} steps; "
        f"{finished.folder / 'run.md'} tells all"
    )
