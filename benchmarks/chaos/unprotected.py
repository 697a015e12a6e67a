"""`nlu serve` without its protection from overload: every call is taken on and none is dropped for being late.

The control of overload.py; a server one would write without thinking of overload.
"""

from __future__ import annotations

import sys
from unittest import mock

from nlu.__main__ import app
from nlu.admission import Admission
from nlu.batcher import Batcher, Ticket


def _everything(_: Admission, ahead: int, wanted: int, remaining_s: float) -> None:
    """Take it on."""


def _all_of(_: Batcher, tickets: list[Ticket]) -> list[Ticket]:
    """Compute it, whether or not somebody still waits."""
    return tickets


if __name__ == "__main__":
    sys.argv = ["nlu", "serve"]
    with mock.patch.object(Admission, "admit", _everything), mock.patch.object(Batcher, "_live", _all_of):
        app()
