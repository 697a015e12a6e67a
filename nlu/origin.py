"""Where the bundle to serve comes from: a folder that was named, the channel of a store, or the package itself."""

from __future__ import annotations

import logging

from nlu.settings import Settings, shipped_bundle
from statics.bundle import Bundle
from statics.errors import NotFound, StaticsError
from statics.local import pinned
from statics.locate import open_store
from statics.pull import Fetched, current, fetch, follow, look
from statics.signing import Keyring
from statics.verify import Trust, verify_bundle
from statics.version import service_version

logger = logging.getLogger(__name__)


def find_bundle(settings: Settings) -> Bundle:
    """The bundle folder that was named; else the channel's newest from the store, or the last good one where that fails;
    else the bundle shipped with the package. For commands that load one bundle and end; a server has a Steward."""
    if not settings.store or settings.bundle is not None:
        return named(settings)
    try:
        fetched = fetch_release(settings)
        follow(settings.statics, fetched)
        return fetched.bundle
    except StaticsError as error:
        bundle = last_good(settings)
        if bundle is None:
            raise
        logger.error("could not pull (%s); serving the last good bundle %s", error, bundle.digest[:12])
        return bundle


def named(settings: Settings) -> Bundle:
    """The bundle folder that was named, else the shipped one; raises StaticsError."""
    if settings.bundle is not None:
        return verify_bundle(settings.bundle, trust_of(settings))
    shipped = shipped_bundle()
    if not shipped.exists():
        raise NotFound(
            part="bundle",
            found=f"neither NLU_BUNDLE nor NLU_STORE, and no bundle inside the package ({shipped})",
            expected="one of them",
            remedy="pass --bundle or set NLU_BUNDLE to a bundle folder, set NLU_STORE to where bundles are published, "
            "or build one with `make starter VECTORIZER=...`",
        )
    logger.info("no bundle and no store named: taking the bundle shipped with the package, %s", shipped)
    # Installers hard-link the files of a package to their cache, so here other names are no sign of meddling.
    return verify_bundle(shipped, trust_of(settings, shared=True))


def pin_of(settings: Settings) -> str:
    """The digest that the deployment, or else an operator on this machine, holds it to; empty: none."""
    return settings.pin or pinned(settings.statics)


def wanted(settings: Settings) -> str:
    """The digest of what should serve: the pin's, else the one the channel points to now, which costs one small object."""
    return pin_of(settings) or look(open_store(settings.store), settings.channel).manifest


def fetch_release(settings: Settings, digest: str = "") -> Fetched:
    """The release of this digest, else the one it is pinned to, else the channel's newest: pulled, verified, not current."""
    return fetch(
        open_store(settings.store),
        settings.statics,
        trust=trust_of(settings),
        channel=settings.channel,
        digest=digest,
        min_seq=settings.min_seq,
        deadline_s=settings.pull_s,
        bytes_s=settings.pull_bytes_s,
    )


def last_good(settings: Settings) -> Bundle | None:
    """What this machine served last, verified again; needs no store."""
    return current(
        settings.statics, trust=trust_of(settings), channel=settings.channel, min_seq=settings.min_seq
    )


def trust_of(settings: Settings, *, shared: bool = False) -> Trust:
    """Read anew each time, so that a keyring can change while a server runs."""
    return Trust(
        service_version(),
        Keyring.load(settings.keyring) if settings.keyring else None,
        settings.require_signature,
        shared,
        signatures=settings.signatures,
        pinned=settings.pin,
    )
