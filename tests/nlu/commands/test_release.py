"""`nlu release` and `nlu swap` against a server that runs as a command does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statics.bundle import Bundle
from statics.publish import publish
from statics.store import FolderStore
from tests.nlu.test_main import nlu
from tests.tiny import make_bundle


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Two of one channel."""
    folder = tmp_path_factory.mktemp("releases")
    return [make_bundle(folder / str(seq), seq=seq).bundle for seq in (1, 2)]


@contextmanager
def serving(folder: Path, **variables: str) -> Iterator[str]:
    """`nlu serve` that follows the store of this folder: the address of its control service."""
    control = f"unix:{folder / 'run' / 'control.sock'}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "nlu", "serve", "--port", "0"],
        env=clean
        | {
            "NLU_STORE": str(folder / "store"),
            "NLU_CHANNEL": "test",
            "NLU_STATICS": str(folder / "pod"),
            "NLU_WATCH_S": "0",
            "NLU_TRIAL": "never",
            "NLU_METRICS": "false",
            "NLU_CONTROL": control,
        }
        | variables,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(r"serving on ", line):
            break
    try:
        yield control
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("processes", ["1", "2"])
def test_release_is_shown_and_swapped(tmp_path: Path, releases: list[Bundle], processes: str) -> None:
    store = FolderStore(tmp_path / "store")
    publish(releases[0], store, channel="test")
    with serving(tmp_path, NLU_PROCESSES=processes) as control:
        same = json.loads(nlu("swap", "--control", control, "--json", cwd=tmp_path).stdout)
        assert (same["bundle"], same["changed"]) == (releases[0].digest, False)
        shown = nlu("release", cwd=tmp_path, env={"NLU_CONTROL": control}).stdout
        assert f"SERVING {releases[0].digest}\nchannel test, seq 1, since 20" in shown

        publish(releases[1], store, channel="test")
        swapped = json.loads(nlu("swap", "--control", control, "--json", cwd=tmp_path).stdout)
        assert (swapped["bundle"], swapped["changed"]) == (releases[1].digest, True)

        refused = nlu("swap", releases[0].digest, "--control", control, cwd=tmp_path, ok=False).stdout
        assert f"SERVING {releases[1].digest}" in refused
        assert f"refused {releases[0].digest}: seq-too-old" in refused
        assert "INVALID_ARGUMENT" in nlu("swap", "abc", "--control", control, cwd=tmp_path, ok=False).stderr


def test_release_needs_certificates_for_an_address_of_a_network(tmp_path: Path) -> None:
    said = nlu("release", "--control", "127.0.0.1:1", cwd=tmp_path, ok=False).stderr
    assert "--ca" in said


def test_release_of_nobody_is_one_clear_line(tmp_path: Path) -> None:
    said = nlu("release", "--control", f"unix:{tmp_path}/nobody.sock", cwd=tmp_path, ok=False).stderr
    assert said.startswith("nlu: UNAVAILABLE")
