"""`nlu index push`: replies into Milvus, for more of them than one machine holds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from nlu.commands.options import JsonOption, extra, out, print_json, settings_for
from nlu.progress import Bar


def push(
    index: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A part index.NAME, as it was built.")
    ],
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", help="Where the pointer goes: an index.NAME for a bundle, in place of that part."
        ),
    ],
    collection: Annotated[
        str, typer.Option(help="A new collection; a name for each release, because none is written twice.")
    ],
    uri: Annotated[str, typer.Option(help="http://host:19530, or a file for Milvus Lite that ends in .db.")],
    float32: Annotated[
        bool, typer.Option("--float32", help="For a server without float16 fields, such as Milvus Lite.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an index into a collection of Milvus, and a pointer that a bundle carries in its place.

    A token for the server is read from NLU_MILVUS_TOKEN.
    """
    from nlu import canaries

    with extra("milvus"):
        from index.push import push as push_index
    kind, _, name = out_folder.name.partition(".")
    if kind != "index" or not name:
        raise typer.BadParameter(f"--out: found {out_folder.name!r}, expected a folder called index.NAME")
    vectorizer = canaries.made_for(index)
    if vectorizer is None:
        raise ValueError(f"{index}: found no {canaries.FILE}, expected a part of a bundle; build it again")
    with Bar() as track:
        pointer = push_index(
            index,
            out_folder,
            uri=uri,
            token=settings_for().milvus_token.get_secret_value(),
            collection=collection,
            vectorizer=vectorizer,
            precision="float32" if float32 else "float16",
            progress=lambda done, total: track.step("pushing", done, total),
        )
    shutil.copyfile(index / canaries.FILE, out_folder / canaries.FILE)
    if as_json:
        print_json({"folder": str(out_folder), **pointer.model_dump(mode="json")})
    else:
        out.print(
            f"{out_folder}: {pointer.rows} rows in {pointer.collection}; put it into a bundle, and serve that with "
            "NLU_MILVUS_URI",
            soft_wrap=True,
        )
