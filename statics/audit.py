"""What happened to the releases of a root, one JSON object a line: for whoever asks later why this one served."""

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

AUDIT = "audit.jsonl"
LONGEST = 1024 * 1024  # bytes; then the file is put aside, in place of the one put aside before
TAIL = 4096  # bytes, more than one line has

Event = Literal["follow", "pin", "unpin", "quarantine", "refuse"]


def note(root: Path, event: Event, *, digest: str, seq: int = 0, reason: str = "") -> None:
    """Add a line; `seq` 0: unknown, `reason`: the code of an error. What the last line says is not said again.

    A root that cannot be written to goes without: that must not keep a pod from serving.
    """
    said = {"event": event, "seq": seq, "digest": digest, "reason": reason}
    path = root / AUDIT
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            tail = os.pread(descriptor, TAIL, max(0, size - TAIL))
            if _last(tail) == said:
                return
            line = json.dumps({"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", **said}) + "\n"
            # A line that a crash cut short stays one line, and never swallows the next.
            os.write(descriptor, (b"" if tail.endswith(b"\n") or not tail else b"\n") + line.encode())
        finally:
            os.close(descriptor)
        if size > LONGEST:
            os.replace(path, path.with_suffix(".old.jsonl"))
    except OSError as error:
        log.debug("%s is not written: %s", path, error)


def _last(tail: bytes) -> dict[str, object] | None:
    lines = tail.splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    value.pop("time", None)
    return value
