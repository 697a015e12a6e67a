"""What is logged: one event one line, no secret, and nothing anybody said.

Of an exception, a line gives types and places, and the words only where they are our own (nlu/errors.py,
statics/errors.py) or the operating system's: other people's exceptions quote what they choked on, which may be what
somebody said. Of a phrase it gives length and a hash that means something within this process alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import traceback
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

from nlu.bucket import Bucket
from nlu.errors import InvalidInput, NluError
from nlu.settings import Settings
from statics.errors import StaticsError

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"  # of metadata and headers, both ways

OURS = ("nlu", "annotators", "index", "statics")

_FAILURES_A_SECOND, _FAILURES_AT_ONCE = (
    20,
    100,
)  # lines; whoever sends nonsense must not fill our disks with it
_FIELD_LIMIT = (
    2000  # characters; lines shorter than a pipe's buffer (4096) are never cut by those of another process
)
_FRAMES, _CAUSES = 12, 4
_SHORTEST_SECRET = 4  # characters; to strike out every "a" would hide the log, not the secret

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Control characters and what ends a line or turns its direction; lone surrogates cannot be written at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SECRETS = (
    (re.compile(r"://[^/\s@]*@"), "://***@"),  # redis://:password@host
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "***"),  # AWS access keys
    (re.compile(r"(?i)\b(aws_secret_access_key|aws_session_token)(\W{1,4})\S+"), r"\1\2***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+\S+"), r"\1 ***"),
    (re.compile(r"\bnlu_[A-Za-z0-9_-]{43}"), "***"),  # tokens of nlu/callers.py
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*KEY-----|$)", re.DOTALL), "***"),
)  # fmt: skip


@dataclass(slots=True)
class Call:
    """One call; lines written while it is handled carry its request id, caller and bundle."""

    method: str
    request_id: str
    caller: str = ""
    bundle: str = ""  # digest of the bundle that answers it
    heard: str = field(default="", repr=False)  # the first text; only its length and hash are ever written


CALL: ContextVar[Call | None] = ContextVar("call", default=None)

_started = f"{secrets.token_hex(4)}-"
_numbers = itertools.count(1)
_hash_key = secrets.token_bytes(32)
# Our own faults (ERROR) have a budget of their own, which no flood of bad calls (INFO) can use up, nor one of what
# libraries say (WARNING): asyncio has a line for every connection it can no longer accept.
_budgets = {
    level: Bucket(_FAILURES_A_SECOND, _FAILURES_AT_ONCE)
    for level in (logging.INFO, logging.WARNING, logging.ERROR)
}
_unwritten = 0


def configure(settings: Settings) -> None:
    """Log to standard error as the settings say. Raises ValueError for a level that does not exist.

    Libraries are heard from WARNING on, whatever our level: their DEBUG has headers, keys and texts in it.
    """
    level = logging.getLevelNamesMapping().get(settings.log_level.upper())
    if level is None:
        raise ValueError(
            f"NLU_LOG_LEVEL: found {settings.log_level!r}, expected DEBUG, INFO, WARNING or ERROR; set one of them"
        )
    handler = logging.StreamHandler()
    form = JsonLines if settings.log_format == "json" else TextLines
    handler.setFormatter(form(secrets_of(settings)))
    handler.addFilter(_heard)
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(max(level, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # it would print a record that cannot be written, as it is


def begin(method: str, metadata: Mapping[str, str]) -> Call:
    """A call that has just come in; `metadata` has lower-case names."""
    call = Call(method, request_id(metadata))
    CALL.set(call)
    return call


def note(*, caller: str = "", bundle: str = "", heard: str = "") -> None:
    """What has become known of the call under way; of its texts the first is kept."""
    call = CALL.get()
    if call is not None:
        call.caller, call.bundle = call.caller or caller, call.bundle or bundle
        call.heard = call.heard or heard


def request_id(metadata: Mapping[str, str]) -> str:
    """The caller's own id where it is sane, else a fresh one."""
    sent = metadata.get(REQUEST_ID)
    if sent is not None and _SANE_ID.fullmatch(sent):
        return sent
    return f"{_started}{next(_numbers):x}"


def ended(call: Call, code: str, seconds: float, error: BaseException | None = None) -> None:
    """The access line: every call at DEBUG, failures at INFO, and at ERROR, with the exception, what is our own fault."""
    level = logging.DEBUG if code == "OK" else logging.ERROR if code == "INTERNAL" else logging.INFO
    if not logger.isEnabledFor(level) or (level in _budgets and not _may_write(level)):
        return
    facts: dict[str, str | float] = {"method": call.method, "code": code, "ms": round(1000 * seconds, 2)}
    if call.heard:
        facts |= {"phrase_chars": len(call.heard), "phrase_hash": hash_of(call.heard)}
    if error is not None:
        facts["error"] = type(error).__name__
    logger.log(
        level,
        "call",
        extra={"facts": facts | _about(call)},
        exc_info=error if level == logging.ERROR else None,
    )


def hash_of(text: str) -> str:
    """The same for the same text within this process; no use to anybody without its memory."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=_hash_key).hexdigest()


def told(error: BaseException, causes: int = _CAUSES) -> str:
    """An exception in one line, innermost frame first: `EngineRefused: head intent: ... (nlu/loading.py:80 load < ...)`."""
    words = f": {error}" if _speaks(error) else ""
    walked = [(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    places = [f"{_short(code.co_filename)}:{number} {code.co_qualname}" for code, number in reversed(walked)]
    line = f"{type(error).__name__}{words}" + (f" ({' < '.join(places[:_FRAMES])})" if places else "")
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return line if cause is None or not causes else f"{line} from {told(cause, causes - 1)}"


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Values that must never be written, longest first: what the settings hide, and what S3 is opened with."""
    hidden = [value.get_secret_value() for _, value in settings if isinstance(value, SecretStr)]
    hidden += [os.environ.get(name, "") for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")]
    parts = {part for value in hidden for part in (value, _password(value)) if len(part) >= _SHORTEST_SECRET}
    return tuple(sorted(parts, key=len, reverse=True))


class _Lines(logging.Formatter):
    """What both formats share: which fields an event has, and what they may contain."""

    def __init__(self, hidden: Iterable[str] = ()) -> None:
        super().__init__()
        self._hidden = tuple(hidden)

    def fields(self, record: logging.LogRecord) -> dict[str, str | float]:
        """Every field, secrets struck out."""
        call = CALL.get()
        facts: dict[str, str | float] = getattr(record, "facts", None) or (
            {} if call is None else _about(call)
        )
        found: dict[str, str | float] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            **facts,
        }
        if record.exc_info and record.exc_info[1] is not None:
            found["exception"] = told(record.exc_info[1])
        return {
            name: self._clean(value) if isinstance(value, str) else value for name, value in found.items()
        }

    def _clean(self, text: str) -> str:
        for secret in self._hidden:
            text = text.replace(secret, "***")
        for pattern, instead in _SECRETS:
            text = pattern.sub(instead, text)
        return text if len(text) <= _FIELD_LIMIT else f"{text[:_FIELD_LIMIT]}... ({len(text)} characters)"


class TextLines(_Lines):
    """`TIME LEVEL LOGGER: MESSAGE name=value ...`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        head = f"{fields.pop('time')} {fields.pop('level')} {fields.pop('logger')}: {fields.pop('message')}"
        return _UNPRINTABLE.sub(
            _escaped, " ".join([head, *(f"{name}={value}" for name, value in fields.items())])
        )


class JsonLines(_Lines):
    """One object a line; everything but printable ASCII is escaped, and is what it was once parsed."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record)).replace("\x7f", "\\u007f")


def _about(call: Call) -> dict[str, str | float]:
    known = {"request_id": call.request_id, "caller": call.caller, "bundle": call.bundle[:12]}
    return {name: value for name, value in known.items() if value}


def _heard(record: logging.LogRecord) -> bool:
    """Whether a line is written: all of ours, of libraries what their budget has room for."""
    return record.name.partition(".")[0] in OURS or _may_write(logging.WARNING)


def _may_write(level: int) -> bool:
    """Whether another line of this budget may be written now; how many were not is told when one is."""
    global _unwritten
    if _budgets[level].take():
        _unwritten += 1
        return False
    if _unwritten:
        logger.info("%d lines before this one were not written; nlu_calls_total has every call", _unwritten)
        _unwritten = 0
    return True


def _message(record: logging.LogRecord) -> str:
    """The message, without what exceptions in it would say."""
    message, args = record.msg, record.args
    if isinstance(message, BaseException):
        message = told(message)
    if isinstance(args, tuple):
        args = tuple(told(arg) if isinstance(arg, BaseException) else arg for arg in args)
    try:
        text = str(message) % args if args else str(message)
    except (TypeError, ValueError, KeyError):
        text = f"{message} (its arguments do not fit)"
    if record.name == "asyncio":  # what follows are arguments of callbacks, and exceptions in their own words
        return re.split(r"[\n(]", text, maxsplit=1)[0]
    return text


def _speaks(error: BaseException) -> bool:
    """Whether the words of an exception are ours, or the operating system's. InvalidInput quotes the caller."""
    if isinstance(error, OSError):
        return type(error).__module__ == "builtins"
    return isinstance(error, (NluError, StaticsError)) and not isinstance(error, InvalidInput)


def _password(secret: str) -> str:
    """What is secret in a URL, or in user:password."""
    return urlsplit(secret).password or "" if "://" in secret else secret.rpartition(":")[2]


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-2:])


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
