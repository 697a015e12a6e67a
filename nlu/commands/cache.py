"""`nlu cache`: prebuilt tables of common phrases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nlu.commands.options import BundleOption, out, settings_for, vectorizer_folder
from nlu.progress import Bar

app = typer.Typer(no_args_is_help=True, help="Prebuilt tables of common phrases.")


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def build(
    phrases: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="Phrases, one a line, the most frequent first."),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="Where the cold table goes, e.g. parts/cold.phrases.")
    ],
    bundle: BundleOption = None,
    tokens: Annotated[
        bool, typer.Option(help="Keep token vectors too; without them token heads still need the model.")
    ] = True,
) -> None:
    """Encode phrases with the bundle's vectorizer into a cold table."""
    from nlu import canaries, cold
    from nlu.errors import InvalidInput
    from nlu.normalizer import normalize
    from nlu.vectorizer import Vectorizer

    vectorizer = Vectorizer(vectorizer_folder(bundle))
    wanted: dict[str, None] = {}
    refused = 0
    for line in phrases.read_text(encoding="utf-8").splitlines():
        try:
            wanted[normalize(line, uncased=vectorizer.spec.uncased).text] = None
        except InvalidInput:
            refused += 1
    with Bar() as track:
        encodings = vectorizer.encode_corpus(list(wanted), tokens=tokens, workers=settings_for().workers)
        pairs = zip(wanted, track(encodings, len(wanted), "encoding"), strict=True)
        count = cold.write(
            out_folder,
            pairs,
            fingerprint=vectorizer.fingerprint,
            dim=vectorizer.dim,
            token_dim=vectorizer.token_dim,
        )
    canaries.write(out_folder, vectorizer)
    size = sum(file.stat().st_size for file in out_folder.iterdir())
    out.print(
        f"{out_folder}: {count} phrases, {size / 2**20:.1f} MiB"
        + (f"; {refused} lines refused" if refused else "")
    )
