"""Forks a process that pulls, for every line it reads; says its id, and after its end how it ended.

python -m benchmarks.chaos.puller STORE ROOT KEYRING
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from statics.errors import StaticsError
from statics.pull import pull
from statics.signing import Keyring
from statics.store import FolderStore
from statics.version import service_version


def main(store: Path, root: Path, keyring: Keyring) -> None:
    """Until the other end of the pipe is closed."""
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            _pull(store, root, keyring)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("while-pulling" if os.WIFSIGNALED(status) else "after-the-end", flush=True)


def _pull(store: Path, root: Path, keyring: Keyring) -> None:
    """In the child: never returns."""
    code = 0
    try:
        pull(
            FolderStore(store),
            root,
            channel="prod",
            service=service_version(),
            keyring=keyring,
            require_signature=True,
        )
    except StaticsError as error:
        print(error, file=sys.stderr)
        code = 1
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Keyring.load(Path(sys.argv[3])))
