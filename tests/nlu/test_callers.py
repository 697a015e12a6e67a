"""nlu.callers: who is let in, how often and to what; and what the file may and may not say."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from pathlib import Path

import pytest

from nlu import callers
from nlu.callers import Callers, add, new_token
from nlu.errors import NluError, NotAllowed, Overloaded, Unauthenticated
from nlu.watched import LOOK_S
from tests.nlu.test_bucket import Clock

DIGEST = hashlib.sha256(b"a token").hexdigest()


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callers.toml"


def test_callers_are_known_by_their_tokens(path: Path) -> None:
    tokens = {name: add(path, name) for name in ("dialogs", "search")}
    gate = Callers.load(path)
    for name, token in tokens.items():
        assert gate.check(bearer(token), "", method="Understand") == name
        assert gate.check({"authorization": f"bearer {token}"}, "", method="Encode") == name
    assert len(set(tokens.values())) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic TOKEN"},
        {"authorization": "TOKEN"},
        {"authorization": "Bearer TOKEN "},
        {"authorization": "Bearer token"},
        {"authorization": f"Bearer {'x' * 513}"},
        {"authorization": "Bearer \udcff\ud800"},
        {"authorization": f"Bearer {DIGEST}"},
        {"x-authorization": "Bearer TOKEN"},
    ],
)
def test_callers_refuse_strangers_without_repeating_them(path: Path, metadata: dict[str, str]) -> None:
    token = add(path, "dialogs")
    gate = Callers.load(path)
    sent = {name: value.replace("TOKEN", token) for name, value in metadata.items()}
    sent = {name: value.replace("token", token.swapcase()) for name, value in sent.items()}
    with pytest.raises(Unauthenticated) as refused:
        gate.check(sent, "", method="Understand")
    assert "expected" in str(refused.value) and token not in str(refused.value)
    assert gate.check(bearer(token), "", method="Understand") == "dialogs"


def test_callers_file_never_has_a_token(path: Path) -> None:
    token = add(path, "dialogs", rate=5)
    text = path.read_text(encoding="utf-8")
    assert token not in text and token.removeprefix(callers.TOKEN_PREFIX) not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text


def test_callers_tokens_have_256_random_bits() -> None:
    made = {new_token()[0] for _ in range(1000)}
    assert len(made) == 1000
    assert {len(token) for token in made} == {
        len(callers.TOKEN_PREFIX) + 43
    }  # 43 letters of base64: 256 bits


def test_callers_old_and_new_token_both_hold_while_one_is_changed_for_the_other(path: Path) -> None:
    (old, old_sha), (new, new_sha) = new_token(), new_token()
    written(path, f'[dialogs]\nsha256 = ["{old_sha}", "{new_sha}"]\n')
    gate = Callers.load(path)
    assert {gate.check(bearer(token), "", method="Encode") for token in (old, new)} == {"dialogs"}


def test_callers_certificate_stands_in_for_a_token_but_not_for_a_wrong_one(path: Path) -> None:
    token, sha256 = new_token()
    written(
        path,
        f'[dialogs]\ncertificates = ["dm.prod.example", "spiffe://prod/dm"]\n[search]\nsha256 = ["{sha256}"]\n',
    )
    gate = Callers.load(path)
    assert gate.check({}, "spiffe://prod/dm", method="Encode") == "dialogs"
    assert gate.check({}, "other.example dm.prod.example", method="Encode") == "dialogs"
    assert gate.check(bearer(token), "dm.prod.example", method="Encode") == "search"
    for metadata, peer in ((bearer("wrong"), "dm.prod.example"), ({}, "dm.prod.example.evil"), ({}, "")):
        with pytest.raises(Unauthenticated):
            gate.check(metadata, peer, method="Encode")


def test_callers_are_held_to_their_methods(path: Path) -> None:
    token, sha256 = new_token()
    written(path, f'[vectors]\nsha256 = ["{sha256}"]\nmethods = ["Encode", "Describe"]\n')
    gate = Callers.load(path)
    assert gate.check(bearer(token), "", method="Encode") == "vectors"
    with pytest.raises(NotAllowed, match="Understand.*Encode or Describe"):
        gate.check(bearer(token), "", method="Understand")


def test_callers_are_held_to_their_rate_each_by_itself(path: Path) -> None:
    """Three at once and two a second, for ten seconds of questions every 10 ms: 3 + 20 are answered, to the one."""
    fast, slow = add(path, "fast"), add(path, "slow", rate=2, burst=3)
    clock = Clock()
    gate = Callers(path, clock_ns=clock)
    answered, pauses = 0, []
    for _ in range(1001):
        gate.check(bearer(fast), "", method="Understand")
        try:
            gate.check(bearer(slow), "", method="Understand")
            answered += 1
        except Overloaded as refused:
            pauses.append(refused.retry_after_ms)
        clock.now += 10_000_000
    assert answered == 3 + 20
    assert max(pauses) == 490 and min(pauses) == 10


def test_callers_spend_for_the_other_items_of_a_batch(path: Path) -> None:
    token = add(path, "dialogs", rate=10)
    gate = Callers(path, clock_ns=Clock())
    gate.check(bearer(token), "", method="UnderstandBatch")
    gate.spend("dialogs", 10)
    with pytest.raises(Overloaded) as refused:
        gate.check(bearer(token), "", method="UnderstandBatch")
    assert refused.value.retry_after_ms == 100


def test_callers_have_a_batch_larger_than_their_burst_from_a_full_bucket(path: Path) -> None:
    token = add(path, "dialogs", rate=10, burst=4)
    clock = Clock()
    gate = Callers(path, clock_ns=clock)
    gate.check(bearer(token), "", method="UnderstandBatch")
    gate.spend("dialogs", 32)
    clock.now += 2_800_000_000  # what it owed
    with pytest.raises(Overloaded):
        gate.check(bearer(token), "", method="UnderstandBatch")


def test_callers_who_are_only_looked_up_spend_nothing(path: Path) -> None:
    token = add(path, "dialogs", rate=1)
    gate = Callers(path, clock_ns=Clock())
    for _ in range(10):
        assert gate.known(bearer(token), "", method="Understand") == "dialogs"
    with pytest.raises(Unauthenticated):
        gate.known({}, "", method="Understand")
    gate.check(bearer(token), "", method="Understand")
    with pytest.raises(Overloaded):
        gate.check(bearer(token), "", method="Understand")


def test_callers_wrong_method_costs_nothing_of_the_rate(path: Path) -> None:
    token, sha256 = new_token()
    written(path, f'[v]\nsha256 = ["{sha256}"]\nmethods = ["Encode"]\nrate = 1\n')
    gate = Callers(path, clock_ns=Clock())
    for _ in range(10):
        with pytest.raises(NotAllowed):
            gate.check(bearer(token), "", method="Understand")
    assert gate.check(bearer(token), "", method="Encode") == "v"


def test_callers_added_and_removed_while_running(path: Path) -> None:
    clock = Clock()
    first = add(path, "first")
    gate = Callers(path, clock_ns=clock)
    second = add(path, "second")
    clock.now += round(LOOK_S * 1e9)
    assert gate.check(bearer(second), "", method="Encode") == "second"
    text = path.read_text(encoding="utf-8")
    written(path, text[text.index("[second]") :])
    clock.now += round(LOOK_S * 1e9)
    with pytest.raises(Unauthenticated):
        gate.check(bearer(first), "", method="Encode")


def test_callers_broken_file_locks_nobody_out_and_nobody_in(path: Path) -> None:
    clock = Clock()
    token = add(path, "dialogs")
    gate = Callers(path, clock_ns=clock)
    written(path, "[dialogs\n")
    clock.now += round(LOOK_S * 1e9)
    assert gate.check(bearer(token), "", method="Encode") == "dialogs"
    with pytest.raises(Unauthenticated):
        gate.check({}, "", method="Encode")


def test_callers_buckets_survive_another_callers_change(path: Path) -> None:
    clock = Clock()
    token = add(path, "dialogs", rate=1)
    gate = Callers(path, clock_ns=clock)
    gate.check(bearer(token), "", method="Encode")
    add(path, "search")
    clock.now += round(LOOK_S * 1e9)
    gate.check(bearer(token), "", method="Encode")  # the second that passed
    with pytest.raises(Overloaded):
        gate.check(bearer(token), "", method="Encode")
    written(path, path.read_text(encoding="utf-8").replace("rate = 1", "rate = 2"))
    clock.now += round(LOOK_S * 1e9)
    assert [gate.check(bearer(token), "", method="Encode") for _ in range(2)] == ["dialogs"] * 2


def test_callers_keep_nothing_about_strangers(path: Path) -> None:
    token = add(path, "dialogs", rate=1_000_000)
    gate = Callers.load(path)

    def knock(count: int) -> None:
        for number in range(count):
            with pytest.raises(Unauthenticated):
                gate.check(bearer(f"{callers.TOKEN_PREFIX}{number:043d}"), f"host-{number}", method="Encode")
            gate.check(bearer(token), "", method="Encode")

    knock(100)
    gc.collect()
    before = sys.getallocatedblocks()
    knock(5000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 500


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no caller"),
        ("[a]\nsha256 = []\n", "a:.*nobody could ever be"),
        (f'[a]\nsha256 = "{DIGEST}"\n', "a.sha256"),
        ('[a]\nsha256 = ["abc"]\n', "a.sha256"),
        (f'[a]\nsha256 = ["{DIGEST.upper()}"]\n', "a.sha256"),
        (f'[a]\nsha256 = ["{DIGEST}"]\nrate = 0\n', "a.rate"),
        (f'[a]\nsha256 = ["{DIGEST}"]\nrate = "9"\n', "a.rate"),
        (f'[a]\nsha256 = ["{DIGEST}"]\nburst = 9\n', "burst without rate"),
        (f'[a]\nsha256 = ["{DIGEST}"]\nmethods = ["Swap"]\n', "a.methods"),
        (f'[a]\nsha256 = ["{DIGEST}"]\ntoken = "a token"\n', "a.token"),
        (f'[a]\nsha256 = ["{DIGEST}"]\n[b]\nsha256 = ["{DIGEST}"]\n', "one token for both a and b"),
        ('[a]\ncertificates = ["x"]\n[b]\ncertificates = ["x"]\n', "one certificate for both a and b"),
        ('[a]\ncertificates = ["two names"]\n', "a.certificates"),
        (f'[a]\nsha256 = ["{DIGEST}"]\n[a]\nsha256 = ["{DIGEST}"]\n', "TOML"),
        (f'["a b"]\nsha256 = ["{DIGEST}"]\n', "found"),
        ("# " + "x" * callers.FILE_LIMIT, "more than"),
    ],
)
def test_callers_file_is_strict_and_says_where(path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"callers.toml.*{told}") as refused:
        Callers.load(written(path, text))
    assert "a token" not in str(refused.value)


def test_callers_file_that_is_not_there_is_an_error(path: Path) -> None:
    with pytest.raises(ValueError, match="NLU_CALLERS: found nothing to read.*expected.*nlu callers add"):
        Callers.load(path)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "[a]", 'a"', "x" * 65, "ая"])
def test_callers_add_refuses_names_the_file_would_not_take(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="found"):
        add(path, name)
    assert not path.exists()


def test_callers_add_keeps_what_is_there_and_takes_no_name_twice(path: Path) -> None:
    written(path, f'# the one we began with\n[old]\nsha256 = ["{DIGEST}"]  # March\n')
    add(path, "new", rate=100, burst=200)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# the one we began with\n") and "# March" in text
    assert "rate = 100\nburst = 200\n" in text
    with pytest.raises(ValueError, match="a caller new already"):
        add(path, "new")
    assert path.read_text(encoding="utf-8") == text
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_callers_refusals_are_errors_of_our_tree() -> None:
    assert all(issubclass(kind, NluError) for kind in (Unauthenticated, NotAllowed, Overloaded))


def test_callers_command_prints_the_token_once(path: Path) -> None:
    from tests.nlu.test_main import nlu

    done = nlu(
        "callers", "add", "dialogs", "--file", str(path), "--rate", "100", "--burst", "200", cwd=path.parent
    )
    token = next(word for word in done.stdout.split() if word.startswith(callers.TOKEN_PREFIX))
    assert done.stdout.count(token) == 1
    assert Callers.load(path).check(bearer(token), "", method="Understand") == "dialogs"
    again = nlu("callers", "add", "dialogs", "--file", str(path), cwd=path.parent, ok=False)
    assert "already" in again.stderr and callers.TOKEN_PREFIX not in again.stdout
    assert os.stat(path).st_size > 0
