"""`nlu bundle`: build, sign, verify, publish, pull, diff, keygen, and the starter bundle; see also channels.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from nlu.commands import channels
from nlu.commands.channels import LONGEST_DAYS, changes_table, expiry, signed_by
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

if TYPE_CHECKING:
    from statics.bundle import Bundle
    from statics.manifest import Manifest

STARTER = Path(".cache/starter")

app = typer.Typer(no_args_is_help=True, help="Versioned bundles of everything that is served.")
app.add_typer(channels.app)


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
    expires_days: Annotated[
        int | None,
        typer.Option(min=1, max=LONGEST_DAYS, help="Pods take it for so many days. Default: for ever."),
    ] = None,
) -> None:
    """Put parts together into a bundle; refuses parts made with another vectorizer."""
    from nlu import parts
    from statics.bundle import build
    from statics.signing import load_private

    key = load_private(sign) if sign else None
    created = datetime.now(UTC)
    bundle = build(
        parts.collect(parts_folder),
        out_folder,
        channel=channel,
        seq=seq,
        created=created,
        expires=None if expires_days is None else created + timedelta(days=expires_days),
        requires_service=requires_service,
        signing_key=key,
    )
    out.print(f"{out_folder}: bundle {bundle.digest}", soft_wrap=True)


@app.command()
def sign(
    what: Annotated[
        str, typer.Argument(help="A bundle folder, or a release: STORE#CHANNEL[@SEQ], STORE#DIGEST.")
    ],
    key: Annotated[Path, typer.Option(help="Private key (PEM).")],
) -> None:
    """Add a signature; those of other keys stay. A release of a store must bear one of a key in NLU_KEYRING."""
    from nlu.origin import trust_of
    from statics import signing
    from statics.publish import add_signatures, countersign
    from statics.releases import check_source, locate
    from statics.verify import read_manifest

    private = signing.load_private(key)
    if Path(what).is_dir():
        countersign(Path(what), private)
        raw, signature = read_manifest(Path(what))
    else:
        store, release = locate(what)
        # Without it whoever writes to the store would choose what this key signs.
        check_source(
            release,
            trust_of(settings_for()).keyring or signing.Keyring({}),
            now=datetime.now(UTC),
            even_expired=True,
        )
        raw, signature = release.raw, signing.sign(release.raw, private, release.signature)
        add_signatures(store, release.pointer.manifest, signature)
    out.print(Text(f"{what}: signed by {signed_by(raw, signature, None)}"), soft_wrap=True)


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
    from nlu.origin import trust_of
    from statics.verify import read_manifest

    bundle = verified(folder)
    folder = bundle.path
    # Installers leave other names to the files of a package, and `verified` has judged that.
    signed = signed_by(*read_manifest(folder, shared=True), trust_of(settings_for()).keyring)
    out.print(
        f"{folder}: {len(bundle.manifest.components)} parts, every file as the manifest says; digest {bundle.digest}",
        soft_wrap=True,
    )
    out.print(
        Text(f"{folder}: signed by {signed}; expires: {expiry(bundle.manifest, datetime.now(UTC))}"),
        soft_wrap=True,
    )
    if load:
        _load(bundle)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A bundle folder.")],
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")],
    channel: Annotated[str | None, typer.Option(help="Default: the channel in the manifest.")] = None,
    load: Annotated[
        bool, typer.Option(help="First load every part, check canaries and golden phrases, as pods will.")
    ] = True,
) -> None:
    """Publish a bundle that loads here: blobs, manifest, and last the channel's pointer."""
    from nlu.origin import trust_of
    from statics.locate import open_store
    from statics.publish import publish
    from statics.verify import check_expiry

    bundle = verified(folder)
    check_expiry(bundle.manifest, trust_of(settings_for()))
    if load:
        _load(bundle)
    with Bar() as track:
        digest = publish(
            bundle,
            open_store(store),
            channel=channel,
            progress=lambda what, done, total: track.step("bytes published", done, total),
        )
    out.print(f"{store}: channel {channel or bundle.manifest.channel} now points to {digest}", soft_wrap=True)


def _load(bundle: Bundle) -> None:
    """Load all parts; EngineRefused where a canary or a golden phrase does not hold."""
    one_blas_thread()
    from nlu import loading

    engine = loading.load(bundle, milvus=settings_for().milvus)
    out.print(f"{bundle.path}: loads; canaries and golden phrases of {len(engine.fleet.names)} heads hold")


@app.command()
def pull(
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")],
    root: Annotated[Path, typer.Argument(help="Where pulled bundles are kept.")],
    channel: Annotated[str, typer.Option(help="Which channel.")] = "prod",
) -> None:
    """Pull a channel's bundle: only what is missing, verified, all or nothing."""
    from nlu.origin import trust_of
    from statics.locate import open_store
    from statics.pull import fetch, follow

    settings = settings_for()
    with Bar() as track:
        fetched = fetch(
            open_store(store), root, trust=trust_of(settings), channel=channel, min_seq=settings.min_seq,
            progress=lambda what, done, total: track.step("bytes pulled", done, total),
            deadline_s=settings.pull_s, bytes_s=settings.pull_bytes_s,
        )  # fmt: skip
    follow(root, fetched)
    bundle = fetched.bundle
    held = " (pinned)" if fetched.pinned else ""
    out.print(
        f"{bundle.path}: bundle {bundle.digest}, channel {channel}, seq {bundle.manifest.seq}{held}",
        soft_wrap=True,
    )


@app.command()
def diff(
    old: Annotated[
        str, typer.Argument(help="A bundle folder, or a release: STORE#CHANNEL[@SEQ], STORE#DIGEST.")
    ],
    new: Annotated[str, typer.Argument(help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """What changed between two bundles, and the bytes a pod would pull."""
    from statics.bundle import diff

    changes = diff(_manifest(old), _manifest(new))
    if as_json:
        print_json(
            {
                "changes": [
                    {"part": c.folder, "what": c.what, "bytes_to_pull": c.bytes_to_pull} for c in changes
                ]
            }
        )
        return
    out.print(changes_table(changes))


def _manifest(which: str) -> Manifest:
    """Of a bundle folder or of a release in a store."""
    if "#" not in which or Path(which).exists():
        return verified(Path(which)).manifest
    from statics.releases import locate

    return locate(which)[1].manifest


@app.command()
def keygen(
    private: Annotated[
        Path, typer.Argument(help="Where the private key goes; keep it in the release job alone.")
    ],
    keyring: Annotated[Path, typer.Argument(help="The JSON file of trusted public keys; this key is added.")],
) -> None:
    """Make a signing key."""
    from statics.signing import Keyring, generate_key, key_id, save_private

    known = Keyring.load(keyring).keys if keyring.exists() else {}
    secret, public = generate_key()
    save_private(secret, private)
    Keyring.of(*known.values(), public).save(keyring)
    out.print(f"{private}: key {key_id(public)}; trusted in {keyring}")
