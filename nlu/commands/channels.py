"""`nlu bundle list | promote | rollback | pin | unpin | gc`: what channels point to, and keeping house below them."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from nlu.commands.options import JsonOption, out, print_json, settings_for

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from statics.bundle import Change
    from statics.manifest import Manifest
    from statics.releases import Draft, Published
    from statics.signing import Keyring, Signer
    from statics.store import Store

LONGEST_DAYS = 36_500  # a calendar ends, and beyond it Python has no dates

app = typer.Typer()

StoreArgument = Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")]
RootArgument = Annotated[Path, typer.Argument(help="Where a machine keeps pulled bundles (NLU_STATICS).")]
KeysOption = Annotated[
    list[Path],
    typer.Option("--key", help="Private key (PEM) to sign with; several where pods ask for several."),
]
DaysOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=LONGEST_DAYS,
        help="Pods take it for so many days. Default: as long as the older release was given.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
EvenExpiredOption = Annotated[bool, typer.Option("--even-expired", help="Take a release that has expired.")]
EvenUnsignedOption = Annotated[
    bool, typer.Option("--even-unsigned", help="Take a release that no trusted key has signed.")
]


@app.command("list")
def history(
    store: StoreArgument,
    channel: Annotated[str, typer.Option(help="Which channel.")] = "prod",
    limit: Annotated[int, typer.Option(min=1, help="How many releases.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """The releases of a channel, newest first; the first one is what pods follow."""
    from nlu.origin import trust_of
    from statics import releases
    from statics.locate import open_store

    keyring, now = trust_of(settings_for()).keyring, datetime.now(UTC)
    found = list(releases.history(open_store(store), channel, limit=limit))
    published = [each for each in found if isinstance(each, releases.Published)]
    gaps = [each for each in found if isinstance(each, releases.Gap)]
    if as_json:
        print_json(
            {
                "channel": channel,
                "releases": [_release_json(each, keyring, each is found[0]) for each in published],
                "gaps": [{"first": gap.first, "last": gap.last, "why": gap.why} for gap in gaps],
            }
        )
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "seq", "digest", "created", "expires", "MB", "signed by"):
        table.add_column(column, no_wrap=column != "signed by")
    for each in published:
        table.add_row(*_release_row(each, keyring, now, each is found[0]))
    out.print(table)
    for each in published:
        restores, note = each.manifest.restores, each.manifest.note
        if restores or note:
            why = f" restores {restores[:12]}: {note}" if restores else f": {note}"
            out.print(Text(f"seq {each.manifest.seq}{why}"), soft_wrap=True)
    for gap in gaps:
        seqs = f"seq {gap.first}" if gap.first == gap.last else f"seq {gap.first} to {gap.last}"
        out.print(Text(f"{seqs}: {gap.why}", style="dim"), soft_wrap=True)


@app.command()
def promote(
    store: StoreArgument,
    source: Annotated[str, typer.Option("--from", help="The channel whose current release is taken.")],
    channel: Annotated[str, typer.Option("--to", help="The channel that it is taken to.")],
    key: KeysOption,
    note: Annotated[str | None, typer.Option(help="Why; one line, kept in the manifest.")] = None,
    expires_days: DaysOption = None,
    even_expired: EvenExpiredOption = False,
    even_unsigned: EvenUnsignedOption = False,
    yes: YesOption = False,
) -> None:
    """Take a channel's current release to another channel: a new signed manifest, and no blobs."""
    from statics import releases
    from statics.locate import open_store

    place, now = open_store(store), datetime.now(UTC)
    taken = releases.current(place, source)
    keys = private_keys(key)
    _check(taken, keys, now, even_expired, even_unsigned)
    draft = releases.promote(place, taken, channel, note=note, now=now, expires=_end(now, expires_days))
    _make(place, draft, keys, yes)


@app.command()
def rollback(
    store: StoreArgument,
    to: Annotated[str, typer.Option(help="The seq or the digest of the release to go back to.")],
    key: KeysOption,
    note: Annotated[str, typer.Option(help="Why; one line, kept in the manifest.")],
    channel: Annotated[str, typer.Option(help="Which channel.")] = "prod",
    expires_days: DaysOption = None,
    even_expired: EvenExpiredOption = False,
    even_unsigned: EvenUnsignedOption = False,
    yes: YesOption = False,
) -> None:
    """Go back: a new release with the next seq and the components of an older one."""
    from statics import releases
    from statics.locate import open_store

    place, now = open_store(store), datetime.now(UTC)
    older = releases.find(place, channel, to)
    keys = private_keys(key)
    _check(older, keys, now, even_expired, even_unsigned)
    draft = releases.rollback(place, channel, older, note=note, now=now, expires=_end(now, expires_days))
    _make(place, draft, keys, yes)


@app.command()
def pin(
    root: RootArgument,
    digest: Annotated[str, typer.Argument(help="The whole digest of the bundle to hold to.")],
) -> None:
    """Hold a machine to one bundle, whatever its channel says, expired or not; only `unpin` ends it."""
    from statics.local import pin

    pin(root, digest)
    out.print(f"{root}: pinned to {digest}", soft_wrap=True)


@app.command()
def unpin(root: RootArgument) -> None:
    """Let a machine follow its channel again."""
    from statics.local import unpin

    out.print(f"{root}: " + ("no longer pinned" if unpin(root) else "was not pinned"), soft_wrap=True)


@app.command()
def gc(
    where: Annotated[
        str, typer.Argument(help="A store, or the folder where a machine keeps pulled bundles.")
    ],
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Releases to keep. Default: 10 of each channel in a store, 2 on a machine."),
    ] = None,
    days: Annotated[
        int,
        typer.Option(
            min=1, max=LONGEST_DAYS, help="Of a store: what is younger stays, a publication may be under way."
        ),
    ] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete what nobody needs any more, and say what."""
    if _is_root(where):
        _collect_root(Path(where), keep, dry_run)
    else:
        _collect_store(where, keep, timedelta(days=days), dry_run)


def private_keys(paths: Sequence[Path]) -> list[Ed25519PrivateKey]:
    from statics.signing import load_private

    return [load_private(path) for path in paths]


def signed_by(raw: bytes, signature: bytes | None, keyring: Keyring | None, letters: int = 16) -> str:
    """Whose signatures there are, by the first `letters` of their key ids, and which of them this deployment trusts."""
    if signature is None:
        return "nobody"
    words = {True: "", False: " (wrong!)", None: " (not trusted)" if keyring else ""}
    found = _signers(raw, signature, keyring)
    if found is None:
        return "(unreadable!)"
    return ", ".join(f"{signer.key_id[:letters]}{words[signer.vouches]}" for signer in found)


def _signers(raw: bytes, signature: bytes | None, keyring: Keyring | None) -> list[Signer] | None:
    """None where the signatures cannot be read: one broken object must not hide a history."""
    from statics.errors import SignatureInvalid
    from statics.signing import Keyring, signers

    try:
        return [] if signature is None else [*signers(raw, signature, keyring or Keyring({}))]
    except SignatureInvalid:
        return None


def expiry(manifest: Manifest, now: datetime) -> str:
    """The last day that pods take it on, in UTC."""
    if manifest.expires is None:
        return "never"
    return f"{manifest.expires:%Y-%m-%d}" + (" (expired)" if manifest.expires <= now else "")


def changes_table(changes: Sequence[Change]) -> Table:
    table = Table("part", "", "bytes to pull", box=None, pad_edge=False, header_style="dim")
    for change in changes:
        table.add_row(change.folder, change.what, f"{change.bytes_to_pull:,}")
    return table


def _release_json(release: Published, keyring: Keyring | None, is_current: bool) -> dict[str, Any]:
    manifest, signed = release.manifest, _signers(release.raw, release.signature, keyring)
    return {
        "current": is_current,
        "seq": manifest.seq,
        "digest": release.pointer.manifest,
        "created": manifest.created.isoformat(),
        "expires": manifest.expires.isoformat() if manifest.expires else None,
        "bytes": manifest.size,
        "signed_by": signed and [{"key": each.key_id, "vouches": each.vouches} for each in signed],
        "restores": manifest.restores,
        "note": manifest.note,
    }


def _release_row(release: Published, keyring: Keyring | None, now: datetime, is_current: bool) -> list[Text]:
    manifest = release.manifest
    cells = (
        "->" if is_current else "",
        str(manifest.seq),
        release.pointer.manifest[:12],
        f"{manifest.created:%Y-%m-%d %H:%M}",
        expiry(manifest, now),
        f"{manifest.size / 1e6:.1f}",
        signed_by(release.raw, release.signature, keyring, letters=8),
    )
    return [Text(cell, style="bold" if is_current else "") for cell in cells]


def _end(now: datetime, days: int | None) -> datetime | None:
    return None if days is None else now + timedelta(days=days)


def _check(
    source: Published,
    keys: Sequence[Ed25519PrivateKey],
    now: datetime,
    even_expired: bool,
    even_unsigned: bool,
) -> None:
    from statics.releases import check_source

    check_source(
        source,
        _ring(keys),
        now=now,
        signatures=settings_for().signatures,
        even_expired=even_expired,
        even_unsigned=even_unsigned,
    )


def _ring(keys: Sequence[Ed25519PrivateKey]) -> Keyring:
    """Whom to believe: the deployment's keyring, or where none is given, the keys that sign now."""
    from nlu.origin import trust_of
    from statics.signing import Keyring

    return trust_of(settings_for()).keyring or Keyring.of(*(key.public_key() for key in keys))


def _make(store: Store, draft: Draft, keys: Sequence[Ed25519PrivateKey], yes: bool) -> None:
    from statics.releases import make

    out.print(_page(draft))
    if not yes:
        typer.confirm("Go on?", abort=True)
    new = make(store, draft, keys=keys, keyring=_ring(keys), signatures=settings_for().signatures, who=_who())
    out.print(f"channel {new.channel} now points to seq {new.seq}, bundle {new.manifest}", soft_wrap=True)


def _page(draft: Draft) -> Any:
    """What a rollback or a promotion would change."""
    from rich.console import Group

    from statics.manifest import dump
    from statics.version import satisfies, service_version

    old, new, source = draft.old, draft.manifest, draft.source
    was = f"seq {old.seq}, {old.manifest[:12]}" if old else "nothing"
    lines = [
        f"{draft.what}: channel {new.channel} points to {was}",
        f"new: seq {new.seq}, with the components of seq {source.manifest.seq} of channel {source.manifest.channel}, "
        f"{source.pointer.manifest[:12]}, expires: {expiry(new, new.created)}",
    ]
    if old is not None and draft.replaces is None:
        lines.append("what it points to cannot be read: below is all a pod would pull that holds nothing")
    pulled = sum(change.bytes_to_pull for change in draft.changes)
    after = [
        f"a pod that follows the channel pulls {pulled:,} bytes; written are {len(dump(new)):,} bytes of manifest"
    ]
    if not satisfies(service_version(), new.requires_service):
        after.append(
            f"it needs service {new.requires_service}, and this is {service_version()}: do pods fit?"
        )
    differ = [change for change in draft.changes if change.what != "same"]
    return Group(
        *map(Text, lines),
        changes_table(differ) if differ else Text("no component changes"),
        *map(Text, after),
    )


def _is_root(where: str) -> bool:
    """Whether this is a machine's folder, not a store; ValueError for a folder that is neither."""
    folder = Path(where)
    if "://" in where or (folder / "channels").is_dir() or (folder / "blobs" / "sha256").is_dir():
        return False
    if (folder / "bundles").is_dir():
        return True
    raise ValueError(
        f"{where}: found neither channels/ nor bundles/, expected a store or the folder of pulled bundles; "
        "correct the path"
    )


def _collect_root(root: Path, keep: int | None, dry_run: bool) -> None:
    from statics.local import collect

    gone = collect(root, 2 if keep is None else keep, dry_run=dry_run)
    verb = "would delete" if dry_run else "deleted"
    for what, digests in (("bundle", gone.bundles), ("component", gone.components)):
        for digest in digests:
            out.print(f"{verb} {what} {digest}", soft_wrap=True)
    out.print(f"{root}: {verb} {len(gone.bundles)} bundles, {gone.bytes / 1e6:.1f} MB")


def _collect_store(url: str, keep: int | None, grace: timedelta, dry_run: bool) -> None:
    from statics.gc import KEEP, garbage, remove
    from statics.locate import open_store

    store, now, keep = open_store(url), datetime.now(UTC), keep or KEEP
    found = garbage(store, keep=keep, grace=grace, now=now)
    for each in found:
        line = f"garbage of {each.modified:%Y-%m-%d}, {each.size:,} bytes: {each.key}"
        out.print(line, soft_wrap=True)
    gone = found if dry_run else remove(store, found, keep=keep, grace=grace, now=now)
    verb = "would delete" if dry_run else "deleted"
    out.print(f"{url}: {verb} {len(gone)} objects, {sum(each.size for each in gone) / 1e6:.1f} MB")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
