"""`nlu bundle`: build, verify, publish, pull, diff, keygen, and the starter bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from nlu.commands.options import (
    JsonOption,
    extra,
    one_blas_thread,
    out,
    print_json,
    settings_for,
    vectorizer_folder,
    verified,
)
from nlu.progress import Bar

STARTER = Path(".cache/starter")

app = typer.Typer(no_args_is_help=True, help="Versioned bundles of everything that is served.")


@app.command()
def starter(
    vectorizer: Annotated[
        Path | None,
        typer.Option(help="A vectorizer folder, or a bundle that holds one. Default: the shipped bundle's."),
    ] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Where the bundle goes.")] = STARTER,
    data: Annotated[
        Path | None, typer.Option(help="A folder of public datasets: also train heads on them, and compare.")
    ] = None,
    created: Annotated[
        int | None,
        typer.Option(
            envvar="SOURCE_DATE_EPOCH",
            help="Seconds since 1970 for the manifest; with it the digest repeats.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build the starter bundle from the authored content, and print how good its heads are."""
    one_blas_thread()
    from datetime import UTC, datetime

    from nlu import content
    from nlu.settings import shipped_bundle

    with extra("heads"):
        from nlu import starter
    with Bar() as track:
        built = starter.build(
            content.load(),
            vectorizer_folder(vectorizer or shipped_bundle()),
            out_folder,
            data=data,
            created=None if created is None else datetime.fromtimestamp(created, UTC),
            progress=track.step,
        )
    if as_json:
        rows = [
            {"head": r.head, "trained_on": r.trained_on, "tested_on": r.tested_on, **r.metrics}
            for r in built.table
        ]
        print_json({"bundle": built.bundle.digest, "folder": str(out_folder), "table": rows})
        return
    columns = {"accuracy": "acc", "macro_f1": "F1", "span_f1": "span F1", "auroc": "AUROC", "ece": "ECE"}
    table = Table(
        "head",
        "trained on",
        "tested on",
        "n",
        *columns.values(),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for row in built.table:
        numbers = [f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in columns]
        table.add_row(row.head, row.trained_on, row.tested_on, str(int(row.metrics["phrases"])), *numbers)
    out.print(table)
    size = sum(file.size for _, file in built.bundle.manifest.files())
    out.print(f"{out_folder}: bundle {built.bundle.digest[:12]}, {size / 1e6:.1f} MB")


@app.command()
def build(
    parts_folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of parts: vectorizer.NAME, head.NAME, index.NAME, cold.NAME, ranker.NAME, adapter.NAME."
        ),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the bundle goes.")],
    channel: Annotated[str, typer.Option(help="The channel it is meant for.")] = "dev",
    seq: Annotated[int, typer.Option(help="Sequence number; must grow with every publication.")] = 1,
    requires_service: Annotated[
        str, typer.Option(help="Version range of this code, e.g. '>=0.1,<0.2'.")
    ] = ">=0.1.0.dev0,<1",
    sign: Annotated[Path | None, typer.Option(help="Private key (PEM) to sign with.")] = None,
) -> None:
    """Put parts together into a bundle; refuses parts made with another vectorizer."""
    from nlu import parts
    from statics.bundle import build
    from statics.signing import load_private

    key = load_private(sign) if sign else None
    bundle = build(
        parts.collect(parts_folder),
        out_folder,
        channel=channel,
        seq=seq,
        requires_service=requires_service,
        signing_key=key,
    )
    out.print(f"{out_folder}: bundle {bundle.digest}")


@app.command()
def verify(
    folder: Annotated[
        Path | None, typer.Argument(help="A bundle folder; without it, what `nlu serve` would serve.")
    ] = None,
    load: Annotated[
        bool, typer.Option(help="Also load every part, check canaries and golden phrases.")
    ] = True,
) -> None:
    """Check manifest, signature, digests and fingerprint chain, then load everything."""
    bundle = verified(folder)
    folder = bundle.path
    out.print(
        f"{folder}: {len(bundle.manifest.components)} parts, every file as the manifest says; digest {bundle.digest}"
    )
    if load:
        from nlu import loading

        engine = loading.load(bundle, milvus=settings_for().milvus)
        out.print(f"{folder}: loads; canaries and golden phrases of {len(engine.fleet.names)} heads hold")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A bundle folder.")],
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")],
    channel: Annotated[str | None, typer.Option(help="Default: the channel in the manifest.")] = None,
) -> None:
    """Publish a bundle: blobs, manifest, and last the channel's pointer."""
    from statics.locate import open_store
    from statics.publish import publish

    bundle = verified(folder)
    with Bar() as track:
        digest = publish(bundle, open_store(store), channel=channel, progress=track.step)
    out.print(f"{store}: channel {channel or bundle.manifest.channel} now points to {digest}")


@app.command()
def pull(
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")],
    root: Annotated[Path, typer.Argument(help="Where pulled bundles are kept.")],
    channel: Annotated[str, typer.Option(help="Which channel.")] = "prod",
) -> None:
    """Pull a channel's bundle: only what is missing, verified, all or nothing."""
    from statics.locate import open_store
    from statics.pull import pull
    from statics.signing import Keyring
    from statics.version import service_version

    settings = settings_for()
    with Bar() as track:
        bundle = pull(
            open_store(store), root, channel=channel, service=service_version(),
            keyring=Keyring.load(settings.keyring) if settings.keyring else None,
            require_signature=settings.require_signature, progress=track.step,
        )  # fmt: skip
    out.print(f"{bundle.path}: bundle {bundle.digest}, channel {channel}, seq {bundle.manifest.seq}")


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="A bundle folder.")],
    new: Annotated[Path, typer.Argument(help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """What changed between two bundles, and the bytes a pod would pull."""
    from statics.bundle import diff

    changes = diff(verified(old).manifest, verified(new).manifest)
    if as_json:
        print_json(
            {
                "changes": [
                    {"part": c.folder, "what": c.what, "bytes_to_pull": c.bytes_to_pull} for c in changes
                ]
            }
        )
        return
    table = Table("part", "", "bytes to pull", box=None, pad_edge=False, header_style="dim")
    for change in changes:
        table.add_row(change.folder, change.what, str(change.bytes_to_pull))
    out.print(table)


@app.command()
def keygen(
    private: Annotated[
        Path, typer.Argument(help="Where the private key goes; keep it in the release job alone.")
    ],
    keyring: Annotated[Path, typer.Argument(help="The JSON file of trusted public keys; this key is added.")],
) -> None:
    """Make a signing key."""
    import base64

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from statics.signing import generate_key, key_id, save_private

    secret, public = generate_key()
    save_private(secret, private)
    known = json.loads(keyring.read_text()) if keyring.exists() else {}
    known[key_id(public)] = base64.b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
    keyring.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    out.print(f"{private}: key {key_id(public)}; trusted in {keyring}")
