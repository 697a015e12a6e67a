"""nlu.guard: what a serving process must not do fails there, with and without `python -O`; and what the self-check finds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nlu import doctor
from nlu.guard import self_check
from nlu.settings import Settings

ROOT = Path(__file__).parents[2]
NOBODY = 65534
STRANGER = "import pickle; pickle.loads(pickle.dumps(range))"  # by name, so it must be found
ACTS = {
    "an object out of a pickle": (STRANGER, "Guarded: pickle.find_class: found in a serving process"),
    "numpy's pickles": (
        "import io, numpy; file = io.BytesIO(); numpy.save(file, numpy.array([range]), allow_pickle=True);"
        "file.seek(0); numpy.load(file, allow_pickle=True)",
        "Guarded: pickle.find_class",
    ),
    "a shell": ("import os; os.system('true')", "Guarded: os.system"),
    "another program": ("import os; os.execv('/bin/true', ['true'])", "Guarded: os.exec"),
    "a fork": ("import os; os.fork() or os._exit(0)", "Guarded: os.fork"),
    "a worker that is forked": (
        "import multiprocessing; child = multiprocessing.get_context('fork').Process(); child.start(); child.join()",
        "Guarded: os.fork",
    ),
    "joblib": ("import joblib", "ImportError: joblib: found in a serving process"),
    "a module of joblib": ("import joblib.numpy_pickle", "ImportError: joblib"),
}  # fmt: skip


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("options", [(), ("-O",)], ids=["plain", "optimised"])
@pytest.mark.parametrize("act", ACTS)
def test_guard_refuses(act: str, options: tuple[str, ...]) -> None:
    code, told = ACTS[act]
    assert options or run(code).returncode == 0  # the negative control: unguarded, it is done
    guarded = run(f"from nlu import guard; guard.arm(); {code}", *options)
    assert guarded.returncode == 1
    assert told in guarded.stderr.splitlines()[-1]


def test_guard_lets_a_server_live() -> None:
    """What serving does is not touched: a new process, an import, a load, an answer."""
    code = (
        "from nlu import guard; guard.arm()\n"
        "import json, pickle, subprocess, sys, uuid\n"
        "from nlu import loading\n"
        "from nlu.settings import shipped_bundle\n"
        "from statics.verify import verify\n"
        "engine = loading.load(verify(shipped_bundle(), service='0.1.0', shared=True))\n"
        "print(len(engine.vectorizer.encode(['hello'])[0].sentence))\n"
        "assert pickle.loads(pickle.dumps([1, 'a'])) == [1, 'a']\n"
        "subprocess.run([sys.executable, '-c', ''], check=True)\n"
    )
    guarded = run(code)
    assert (guarded.returncode, guarded.stderr) == (0, "")


def test_guard_is_armed_in_what_serves() -> None:
    settled = run(
        f"from nlu.serve import settle; from nlu.settings import Settings; settle(Settings()); {STRANGER}"
    )
    assert "Guarded: pickle.find_class" in settled.stderr.splitlines()[-1]
    worker = (ROOT / "nlu" / "worker.py").read_text(encoding="utf-8")
    assert "settle(settings)" in worker  # a worker is a process of its own


FORBIDDEN = re.compile(
    r"^\s*(import|from) (pickle|shelve|joblib|cloudpickle|dill|marshal)\b"
    r"|\b(torch|joblib|pickle|cloudpickle|dill)\.loads?\(|allow_pickle=True|\byaml\.(unsafe_)?load\(",
    re.MULTILINE,
)
# Training and learning run where the data is, not where callers are.
TRAINING = ("nlu/training/", "nlu/heads/", "nlu/retrieval/")


def test_guard_serving_code_names_no_pickle() -> None:
    found = {
        str(path.relative_to(ROOT)): match[0]
        for package in ("nlu", "annotators", "index", "statics")
        for path in (ROOT / package).rglob("*.py")
        if not str(path.relative_to(ROOT)).startswith(TRAINING)
        and (match := FORBIDDEN.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle\n", "    from joblib import load\n", "x = torch.load(path)\n", "np.load(f, allow_pickle=True)\n"],
)  # fmt: skip
def test_guard_pattern_finds(line: str) -> None:
    """The negative control of the search above."""
    assert FORBIDDEN.search(line)


def test_guard_sessions_are_made_from_bytes() -> None:
    """A path would let ONNX Runtime read files beside the model."""
    made = {
        str(path.relative_to(ROOT)): re.findall(
            r"InferenceSession\(\s*(\w+)", path.read_text(encoding="utf-8")
        )
        for package in ("nlu", "annotators", "index", "statics")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path: names for path, names in made.items() if names} == {
        "annotators/boosted.py": ["model"],
        "nlu/ranker.py": ["model"],
        "nlu/vectorizer.py": ["model"],
    }


def about(settings: Settings, path: Path) -> list[str]:
    return [line for line in self_check(settings) if line.startswith(str(path))]


@pytest.mark.parametrize(
    ("field", "closed", "loose"),
    [
        ("bundle", 0o555, 0o577),
        ("statics", 0o755, 0o777),
        ("keyring", 0o644, 0o664),
        ("callers", 0o644, 0o646),
        ("tls_key", 0o640, 0o644),
    ],
)
def test_guard_self_check_finds_what_others_may_touch(
    tmp_path: Path, field: str, closed: int, loose: int
) -> None:
    path = tmp_path / "it"
    path.mkdir() if field in ("bundle", "statics") else path.write_text("")
    settings = Settings(**{"statics": tmp_path, field: path})  # type: ignore[arg-type]
    path.chmod(closed)
    assert about(settings, path) == []  # the control
    path.chmod(loose)
    (line,) = about(settings, path)
    assert line == f"{path}: found mode {loose:03o}, expected at most {closed:03o}; chmod {closed:03o} {path}"


def test_guard_self_check_wants_keys_for_a_store(tmp_path: Path) -> None:
    keyring = tmp_path / "keys"
    keyring.write_text("")
    unsigned = Settings(store=str(tmp_path), statics=tmp_path)
    assert any(line.startswith("NLU_KEYRING: found none") for line in self_check(unsigned))
    signed = unsigned.model_copy(update={"keyring": keyring})
    assert not any(line.startswith("NLU_KEYRING") for line in self_check(signed))


def as_account(uid: int, bundle: Path) -> list[str]:
    """What the self-check of a process of another account says."""
    code = (
        "import os, sys; from pathlib import Path; from nlu.guard import self_check; from nlu.settings import Settings;"
        f"settings = Settings(bundle=Path({str(bundle)!r}), statics=Path('/nowhere'));"
        f"os.setuid({uid}); print(*self_check(settings), sep='\\n', end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another account")
def test_guard_self_check_knows_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert as_account(0, tmp_path) == [
        "process: found uid 0, expected an account of its own; set runAsUser (Kubernetes) or User= (systemd)"
    ]
    assert as_account(NOBODY, tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another account")
def test_guard_self_check_wants_a_bundle_that_cannot_be_written(tmp_path: Path) -> None:
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    os.chown(tmp_path, NOBODY, -1)
    tmp_path.chmod(0o500)
    assert as_account(NOBODY, tmp_path) == []  # the control
    tmp_path.chmod(0o700)
    (line,) = as_account(NOBODY, tmp_path)
    assert line.startswith(f"{tmp_path}: found the bundle writable by this process")


def test_guard_is_examined_by_the_doctor(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("")
    key.chmod(0o644)
    settings = Settings(statics=tmp_path, tls_key=key)
    found = [finding for finding in doctor.examine(settings) if finding.check == "safety"]
    assert any(str(key) in finding.found and finding.state == "note" and finding.remedy for finding in found)
    key.chmod(0o600)
    assert not any(
        str(key) in finding.found for finding in doctor.examine(settings) if finding.check == "safety"
    )
