"""`nlu heads`: teach heads, and move them in and out of bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nlu.commands.options import BundleOption, JsonOption, one_blas_thread, out, print_json, verified

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from statics.bundle import Bundle

app = typer.Typer(no_args_is_help=True, help="Teach heads, and move them in and out of bundles.")

HeadArgument = Annotated[
    Path, typer.Argument(help="A folder called head.NAME, or one that holds exactly one of them.")
]
NameArgument = Annotated[str, typer.Argument(help="Name of a head, such as intent.")]
OutOption = Annotated[
    Path, typer.Option("--out", help="Where the new bundle goes; it may be the one that is changed.")
]
SignOption = Annotated[Path | None, typer.Option("--sign", help="Private key (PEM) to sign with.")]


@app.command()
def add(
    head: Annotated[
        Path,
        typer.Argument(
            help="A folder called head.NAME, or one that holds exactly one of them; or another part, such as adapter.NAME."
        ),
    ],
    out_folder: OutOption,
    bundle: BundleOption = None,
    sign: SignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle with one head more."""
    one_blas_thread()
    from nlu.heads import lifecycle

    old = verified(bundle)
    _show(old, lifecycle.add(old, head, out_folder, signing_key=_key(sign)), sign, as_json)


@app.command()
def replace(
    head: HeadArgument,
    out_folder: OutOption,
    bundle: BundleOption = None,
    sign: SignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle with this head in the place of its namesake."""
    one_blas_thread()
    from nlu.heads import lifecycle

    old = verified(bundle)
    _show(old, lifecycle.replace(old, head, out_folder, signing_key=_key(sign)), sign, as_json)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of a head, or of another part, such as adapter.NAME.")],
    out_folder: OutOption,
    shadow: Annotated[bool, typer.Option("--shadow", help="The shadow of that name, not the head.")] = False,
    bundle: BundleOption = None,
    sign: SignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle without a head, or without its shadow."""
    one_blas_thread()
    from nlu.heads import lifecycle

    old = verified(bundle)
    _show(old, lifecycle.remove(old, name, out_folder, shadow=shadow, signing_key=_key(sign)), sign, as_json)


@app.command()
def shadow(
    head: HeadArgument,
    out_folder: OutOption,
    bundle: BundleOption = None,
    sign: SignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle in which this head answers unheard beside the live head of its name; flips are counted."""
    one_blas_thread()
    from nlu.heads import lifecycle

    old = verified(bundle)
    _show(old, lifecycle.shadow(old, head, out_folder, signing_key=_key(sign)), sign, as_json)


@app.command()
def promote(
    name: NameArgument,
    out_folder: OutOption,
    bundle: BundleOption = None,
    sign: SignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle in which a head and its shadow have changed places."""
    one_blas_thread()
    from nlu.heads import lifecycle

    old = verified(bundle)
    _show(old, lifecycle.promote(old, name, out_folder, signing_key=_key(sign)), sign, as_json)


@app.command()
def rollback(
    name: NameArgument,
    out_folder: OutOption,
    bundle: BundleOption = None,
    sign: SignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle in which the head that was live before a promotion is live again."""
    one_blas_thread()
    from nlu.heads import lifecycle

    old = verified(bundle)
    _show(old, lifecycle.rollback(old, name, out_folder, signing_key=_key(sign)), sign, as_json)


def _key(path: Path | None) -> Ed25519PrivateKey | None:
    from statics.signing import load_private

    return load_private(path) if path else None


def _show(old: Bundle, new: Bundle, sign: Path | None, as_json: bool) -> None:
    """What differs, what a pod that holds the old bundle pulls, and what can be done with the new one."""
    from statics.bundle import diff

    changes = [change for change in diff(old.manifest, new.manifest) if change.what != "same"]
    pulled = sum(change.bytes_to_pull for change in changes)
    manifest = new.manifest
    if as_json:
        print_json(
            {
                "bundle": new.digest,
                "folder": str(new.path),
                "channel": manifest.channel,
                "seq": manifest.seq,
                "changes": [
                    {
                        "part": change.folder,
                        "what": change.what,
                        "old": change.old.digest if change.old else None,
                        "new": change.new.digest if change.new else None,
                        "bytes_to_pull": change.bytes_to_pull,
                    }
                    for change in changes
                ],
                "bytes_to_pull": pulled,
            }
        )
        return
    table = Table("part", "", "digest", "bytes to pull", box=None, pad_edge=False, header_style="dim")
    for change in changes:
        digests = [part.digest[:12] if part else "nothing" for part in (change.old, change.new)]
        table.add_row(change.folder, change.what, " -> ".join(digests), f"{change.bytes_to_pull:,}")
    out.print(table)
    signed = "signed" if sign else "unsigned"
    out.print(
        f"{new.path}: bundle {new.digest[:12]}, channel {manifest.channel}, seq {manifest.seq}, {signed}"
    )
    out.print(f"a pod that holds the old bundle pulls {pulled:,} bytes")
    out.print(f"next: nlu serve --bundle {new.path}", style="dim")
    out.print(f"      nlu bundle publish {new.path} STORE", style="dim")
