"""docs/adding-an-annotator.md as a newcomer reads it: every command on the page, in its order, and what it promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lightgbm", reason="needs the heads extra: pip install 'chorus-nlu[heads]'")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding-an-annotator.md"
PORT = "50061"

pytestmark = pytest.mark.timeout(600)


def commands() -> list[str]:
    """The lines of the page's shell blocks, without the setting up of the environment that runs this test."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("make heads", "export PATH"))]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder in which every command has been run, and what each printed."""
    work = tmp_path_factory.mktemp("newcomer")
    (work / "docs").symlink_to(ROOT / "docs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NLU_")}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NLU_METRICS": "false", "COLUMNS": "160",
    }  # fmt: skip
    printed: dict[str, str] = {}
    server: subprocess.Popen[str] | None = None
    try:
        for line in commands():
            command = line.replace(PORT, port)
            if command.rstrip().endswith("&"):
                server = _serving(command.rstrip("& "), work, environment)
                continue
            done = subprocess.run(
                ["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True, check=False
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed[line] = done.stdout
        yield work, printed
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=30)


def _serving(command: str, work: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        shlex.split(command), cwd=work, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if "serving on" in line:
            return server
    raise AssertionError("".join(said))


def said(printed: dict[str, str], words: str) -> str:
    """What the one command with these words printed."""
    found = [text for line, text in printed.items() if words in line]
    assert len(found) == 1, f"{len(found)} commands with {words!r}"
    return found[0]


def test_adding_an_annotator_page_has_commands() -> None:
    assert len(commands()) > 15
    assert all(line.startswith(("nlu ", "cat ", "NLU_STORE=")) for line in commands())


def test_adding_an_annotator_answers_what_the_page_shows(walked: tuple[Path, dict[str, str]]) -> None:
    _, printed = walked
    shown = re.search(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1].split() == said(printed, "could you make me a cappuccino").splitlines()[2].split()


def test_adding_an_annotator_serves_the_new_head(walked: tuple[Path, dict[str, str]]) -> None:
    _, printed = walked
    assert "coffee_status" in said(printed, "--target")
    assert "coffee_clean" in said(printed, "descale it")
    assert "[two]count [lattes]drink with [oat milk]extra" in said(printed, "two lattes with oat milk please")


def test_adding_an_annotator_leaves_a_report(walked: tuple[Path, dict[str, str]]) -> None:
    work, _ = walked
    for name in ("coffee", "coffee-2", "anchors", "answers", "orders", "machine"):
        report = json.loads((work / "heads" / name / "report.json").read_text(encoding="utf-8"))
        page = (work / "heads" / name / "report.html").read_text(encoding="utf-8")
        assert report["head"]["name"] in page
    assert (work / "suggested.tsv").read_text(encoding="utf-8").count("\n") == 6


def test_adding_an_annotator_promotes_and_rolls_back(walked: tuple[Path, dict[str, str]]) -> None:
    work, _ = walked

    def live(bundle: str) -> str:
        manifest = json.loads((work / "bundles" / bundle / "manifest.json").read_text(encoding="utf-8"))
        digests = {f"{each['kind']}.{each['name']}": str(each["digest"]) for each in manifest["components"]}
        return digests["head.coffee"]

    assert live("shadowed") == live("coffee") == live("back") != live("promoted")
