"""What a serving process never does, held at the interpreter itself, and what an operator should know before it serves.

Nothing of ours unpickles, forks or starts a shell while it serves. A library that would, because of something in a bundle,
a cache or a call, is stopped by an audit hook (PEP 578), whatever path led there. Code that already runs in the process
could get around it: this is a net under the other defences and no sandbox.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nlu.settings import Settings

# Audit events, and what is wrong with each. Imports themselves use marshal, and our disk and memory code ctypes, so those stay.
_EVENTS = {
    "pickle.find_class": "a pickle may run any code; keep weights in safetensors or ONNX, all else in JSON",
    "os.system": "a shell has no place in a server",
    "os.exec": "a server does not become another program",
    "os.fork": "threads of gRPC and ONNX Runtime do not survive a fork; start a new process instead",
    "os.forkpty": "threads of gRPC and ONNX Runtime do not survive a fork; start a new process instead",
    "pty.spawn": "a shell has no place in a server",
}
_MODULES = frozenset({"joblib", "cloudpickle", "dill"})  # each is a way to unpickle
_OTHERS_WRITE, _ALL_READ = stat.S_IWGRP | stat.S_IWOTH, stat.S_IROTH


class Guarded(RuntimeError):
    """Something in this process tried what it must not; the message says what, and what to do instead."""


def arm() -> None:
    """From now on, for the rest of this process, refuse what `_EVENTS` and `_MODULES` name, by raising Guarded.

    Called once by the commands that serve, before a bundle is opened; there is no way back.
    """
    sys.addaudithook(_watch)


def self_check(settings: Settings) -> list[str]:
    """What makes this process or its files weaker than they need be; each line says what was found and what to do."""
    return [*_process(), *_folders(settings), *_secrets(settings)]


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event in _EVENTS:
        raise Guarded(f"{event}: found in a serving process, expected never there; {_EVENTS[event]}")
    if event == "import" and args[0].partition(".")[0] in _MODULES:
        # As if it were not installed, so that a library which can do without it does.
        raise ImportError(f"{args[0]}: found in a serving process, expected never there; it unpickles")


def _process() -> Iterator[str]:
    if os.geteuid() == 0:
        yield "process: found uid 0, expected an account of its own; set runAsUser (Kubernetes) or User= (systemd)"


def _folders(settings: Settings) -> Iterator[str]:
    """A bundle is read where it lies, so who can write there after the check decides what is answered."""
    if settings.bundle is not None and os.geteuid() != 0 and os.access(settings.bundle, os.W_OK):
        yield f"{settings.bundle}: found the bundle writable by this process, expected a read-only mount; mount it so"
    for path in (settings.bundle, settings.statics):
        yield from _loose(path, _OTHERS_WRITE)


def _secrets(settings: Settings) -> Iterator[str]:
    yield from _loose(settings.keyring, _OTHERS_WRITE)
    yield from _loose(settings.callers, _OTHERS_WRITE)
    yield from _loose(settings.tls_key, _OTHERS_WRITE | _ALL_READ)
    if settings.store and settings.keyring is None:
        yield (
            "NLU_KEYRING: found none, expected the public keys of who may sign, as else whoever can write to the store "
            "decides what is answered; set it"
        )


def _loose(path: Path | None, bits: int) -> Iterator[str]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path is not None else 0
    except OSError:
        return  # whether it has to be there is for whoever reads it
    if mode & bits:
        yield f"{path}: found mode {mode:03o}, expected at most {mode & ~bits:03o}; chmod {mode & ~bits:03o} {path}"
