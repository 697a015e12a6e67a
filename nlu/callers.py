"""Who may call, how often and what: a file of names with hashed tokens, looked at again when it changes.

A token is 256 random bits, so its plain SHA-256 cannot be undone by guessing, as that of a password could: a slow hash
(bcrypt, scrypt) would only make every call slow, and a wrong token as dear as a right one. A token is looked up by its
digest; how long that takes says nothing about the token.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from nlu import logs, metrics
from nlu.bucket import Bucket
from nlu.errors import NotAllowed, Overloaded, Unauthenticated
from nlu.watched import Watched

FILE_LIMIT = 2**17  # bytes; a thousand callers, which take some 30 ms to read, with nobody answered meanwhile
TOKEN_PREFIX = "nlu_"  # so that scanners of repositories and logs know one when they see it
_TOKEN_BYTES = 32
_TOKEN_LIMIT = 512  # characters; what is longer is refused without hashing it

K = TypeVar("K", bytes, str)
Method = Literal["Understand", "UnderstandBatch", "UnderstandStream", "Encode", "Describe"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# What tls.py lets through of a certificate's names, so that every name in the file can be met.
CertificateName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/@*-]{1,253}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Caller(BaseModel):
    """One table of the file; several tokens let a new one be handed out before the old one is taken away."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sha256: list[Sha256] = []
    certificates: list[CertificateName] = []  # any of these among a verified certificate's names will do
    rate: int | None = Field(None, ge=1, le=1_000_000)  # a second; absent: no limit
    burst: int | None = Field(None, ge=1, le=1_000_000)  # at once; absent: one second's worth
    methods: list[Method] | None = None  # absent: all

    @model_validator(mode="after")
    def _can_be_met(self) -> Caller:
        if not self.sha256 and not self.certificates:
            raise ValueError("neither sha256 nor certificates, so nobody could ever be this caller")
        if self.burst is not None and self.rate is None:
            raise ValueError("burst without rate")
        return self


_FILE = TypeAdapter(dict[Name, Caller])


@dataclass(frozen=True)
class _Book:
    """The file, by what a call shows."""

    callers: Mapping[str, Caller]
    by_token: Mapping[bytes, str]
    by_certificate: Mapping[str, str]


class Callers:
    """The gate every call passes, whatever its transport. Of one thread; a call costs some microseconds.

    Nothing is kept about strangers, so memory is bounded by the file. Each process has buckets of its own.
    """

    def __init__(self, path: Path, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Raises ValueError for a file that cannot be used; once running, a broken one changes nothing."""
        self._clock_ns = clock_ns
        self._book = Watched("callers", (path,), lambda: _read(path), clock=lambda: clock_ns() / 1e9)
        self._buckets: dict[str, Bucket] = {}

    @classmethod
    def load(cls, path: Path) -> Callers:
        """Of a file in the format of docs/tls-and-callers.md."""
        return cls(path)

    def check(self, metadata: Mapping[str, str], peer: str, *, method: str) -> str:
        """The name of who calls, and one call more of theirs. Raises as `known` does, and Overloaded."""
        name = self.known(metadata, peer, method=method)
        self._spend(name, 1)
        return name

    def known(self, metadata: Mapping[str, str], peer: str, *, method: str) -> str:
        """The name of who calls. `metadata` has lower-case names; `peer` is what tls.py says of the certificate.

        A token that is sent must be right, whatever the certificate. Raises Unauthenticated, NotAllowed.
        """
        book = self._book.now()
        name = _by_token(book, metadata) or _by_certificate(book, peer)
        logs.note(caller=name)  # also of a call that is refused for another reason
        methods = book.callers[name].methods
        if methods is not None and method not in methods:
            raise NotAllowed(
                f"caller {name}: found a call of {method}, expected {' or '.join(methods) or 'none'}; "
                "ask the operator for more methods"
            )
        return name

    def spend(self, name: str, count: int) -> None:
        """What `check` counted as one call is a batch of so many: count the others too, or raise Overloaded."""
        self._spend(name, count, had=1)

    def _spend(self, name: str, count: int, *, had: int = 0) -> None:
        book = self._book.now()
        caller = book.callers.get(name)  # None: taken out of the file since it was let in
        if caller is None or caller.rate is None:
            return
        rate, burst = caller.rate, caller.burst
        bucket = self._buckets.get(name)
        if bucket is None or (bucket.rate, bucket.burst) != (rate, burst or rate):
            self._buckets = {known: kept for known, kept in self._buckets.items() if known in book.callers}
            bucket = self._buckets[name] = Bucket(rate, burst or rate, clock_ns=self._clock_ns)
        wait_ms = bucket.take(count, had=had)
        if wait_ms:
            metrics.SHED.labels("rate").inc()
            raise Overloaded(f"caller {name} may call {rate} times a second", retry_after_ms=wait_ms)


def new_token() -> tuple[str, str]:
    """A fresh token and its SHA-256, as the file has it."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    return token, hashlib.sha256(token.encode()).hexdigest()


def entry(name: str, sha256: str, *, rate: int | None = None, burst: int | None = None) -> str:
    """A caller as it is written in the file. Raises ValueError for a name, rate or burst the file would not take."""
    limits = {"rate": rate, "burst": burst}
    given = {key: value for key, value in limits.items() if value is not None}
    _parse({name: {"sha256": [sha256], **given}}, "the new caller")
    return "\n".join(
        [f"[{name}]", f'sha256 = ["{sha256}"]', *(f"{key} = {value}" for key, value in given.items()), ""]
    )


def add(path: Path, name: str, *, rate: int | None = None, burst: int | None = None) -> str:
    """Add a caller to the file, which is made where there is none, and return the token. Raises ValueError, OSError.

    The file is replaced whole, so that a server which is just reading sees the old one or the new one.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before.strip() and name in _read(path).callers:
        raise ValueError(
            f"{path}: found a caller {name} already, expected a new name; choose another, or take its table out first"
        )
    token, sha256 = new_token()
    written = entry(name, sha256, rate=rate, burst=burst)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(f"{before.rstrip()}\n\n{written}".lstrip(), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return token


def _by_token(book: _Book, metadata: Mapping[str, str]) -> str | None:
    sent = metadata.get("authorization")
    if sent is None:
        return None
    scheme, _, token = sent.partition(" ")
    if scheme.lower() != "bearer" or not token or len(token) > _TOKEN_LIMIT:
        raise Unauthenticated(
            "authorization: found something else, expected 'Bearer TOKEN'; send the token as it was handed out"
        )
    name = book.by_token.get(hashlib.sha256(token.encode(errors="surrogatepass")).digest())
    if name is None:
        raise Unauthenticated(
            "authorization: found a token nobody here was given, expected a caller's; ask the operator for one"
        )
    return name


def _by_certificate(book: _Book, peer: str) -> str:
    for name in peer.split():
        caller = book.by_certificate.get(name)
        if caller is not None:
            return caller
    raise Unauthenticated(
        "authorization: found no token"
        + (" and a certificate of nobody known here" if peer else "")
        + ", expected 'Bearer TOKEN'; ask the operator for one"
    )


def _read(path: Path) -> _Book:
    """Raises ValueError."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ValueError(
            f"NLU_CALLERS: found nothing to read at {path} ({error.strerror}), expected a file of callers; "
            f"make one with `nlu callers add NAME --file {path}`"
        ) from error
    if len(raw) > FILE_LIMIT:
        raise ValueError(
            f"{path}: found more than {FILE_LIMIT} bytes, expected a file of callers; set NLU_CALLERS to one"
        )
    try:
        callers = _parse(tomllib.loads(raw.decode("utf-8")), str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: found {error}, expected TOML; see docs/tls-and-callers.md") from error
    if not callers:
        raise ValueError(
            f"{path}: found no caller, expected one table each; add one with `nlu callers add NAME --file {path}`"
        )
    return _Book(
        callers=callers,
        by_token=_unique(
            path, "token", ((bytes.fromhex(d), n) for n, c in callers.items() for d in c.sha256)
        ),
        by_certificate=_unique(
            path, "certificate", ((d, n) for n, c in callers.items() for d in c.certificates)
        ),
    )


def _parse(tables: dict[str, object], where: str) -> dict[str, Caller]:
    try:
        return _FILE.validate_python(tables)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"] if step != "[key]")
        raise ValueError(
            f"{where}: {place}: found {first['msg']}, expected what docs/tls-and-callers.md names; mend that line"
        ) from error


def _unique(path: Path, what: str, pairs: Iterable[tuple[K, str]]) -> dict[K, str]:
    found: dict[K, str] = {}
    for key, name in pairs:
        if found.setdefault(key, name) != name:
            raise ValueError(
                f"{path}: found one {what} for both {found[key]} and {name}, expected each to be of one caller; "
                "take one out"
            )
    return found
