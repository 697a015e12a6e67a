"""nlu.cold: the table answers what was written, to the bit, and refuses files that cannot be what a build wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from annotators.annotator import Encoding
from nlu import cold, record
from nlu.cold import ENDS_FILE, KEYS_FILE, RECORDS_FILE, SPEC_FILE, ColdTable
from nlu.errors import EngineRefused
from nlu.vectorizer import Vectorizer

PHRASES = ("hello", "stop", "turn the lamp on", "доброе утро", "x " * 60 + "x", "?!", "7")


def write(out: Path, vectorizer: Vectorizer, phrases: tuple[str, ...] = PHRASES) -> int:
    encodings = zip(phrases, vectorizer.encode(phrases), strict=True)
    return cold.write(
        out, encodings, fingerprint=vectorizer.fingerprint, dim=vectorizer.dim, token_dim=vectorizer.token_dim
    )


@pytest.fixture
def folder(tmp_path: Path, vectorizer: Vectorizer) -> Path:
    """A good table; every malformed one in these tests starts as this one."""
    write(tmp_path / "cold", vectorizer)
    return tmp_path / "cold"


@pytest.mark.parametrize("phrase", PHRASES)
def test_cold_answers_as_fresh_bit_for_bit(folder: Path, vectorizer: Vectorizer, phrase: str) -> None:
    found = ColdTable(folder).get(record.key(vectorizer.fingerprint, phrase))
    fresh = vectorizer.encode([phrase])[0]
    assert found is not None
    assert found.tokens is not None
    assert found.offsets is not None
    assert fresh.tokens is not None
    assert fresh.offsets is not None
    assert found.sentence.tobytes() == fresh.sentence.tobytes()
    assert found.tokens.tobytes() == fresh.tokens.tobytes()
    assert found.offsets.tobytes() == fresh.offsets.tobytes()


def test_cold_answers_an_encoding_without_tokens(tmp_path: Path, vectorizer: Vectorizer) -> None:
    encoding = vectorizer.encode(["hello"], tokens=False)[0]
    cold.write(tmp_path, [("hello", encoding)], fingerprint=vectorizer.fingerprint, dim=8, token_dim=4)
    found = ColdTable(tmp_path).get(record.key(vectorizer.fingerprint, "hello"))
    assert found is not None
    assert found.tokens is None
    assert found.sentence.tobytes() == encoding.sentence.tobytes()


@pytest.mark.parametrize("phrase", ["hallo", "hello ", "", "stop stop"])
def test_cold_does_not_know_what_was_not_written(folder: Path, vectorizer: Vectorizer, phrase: str) -> None:
    assert ColdTable(folder).get(record.key(vectorizer.fingerprint, phrase)) is None


def test_cold_does_not_know_another_vectorizer(folder: Path) -> None:
    assert ColdTable(folder).get(record.key("00" * 32, "hello")) is None


@pytest.mark.parametrize("phrase_key", [bytes(32), b"\xff" * 32], ids=["below-all", "above-all"])
def test_cold_looks_beyond_its_ends(folder: Path, phrase_key: bytes) -> None:
    assert ColdTable(folder).get(phrase_key) is None


def test_cold_counts_each_phrase_once(tmp_path: Path, vectorizer: Vectorizer) -> None:
    assert write(tmp_path, vectorizer, ("hello", "stop", "hello")) == 2
    assert len(ColdTable(tmp_path)) == 2


def test_cold_may_be_empty(tmp_path: Path, vectorizer: Vectorizer) -> None:
    assert write(tmp_path, vectorizer, ()) == 0
    table = ColdTable(tmp_path)
    assert (len(table), table.get(record.key(vectorizer.fingerprint, "hello"))) == (0, None)


def test_cold_same_phrases_in_any_order_give_same_bytes(tmp_path: Path, vectorizer: Vectorizer) -> None:
    write(tmp_path / "a", vectorizer)
    write(tmp_path / "b", vectorizer, PHRASES[::-1])
    for name in (SPEC_FILE, KEYS_FILE, ENDS_FILE, RECORDS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_cold_spec_names_its_vectorizer(folder: Path, vectorizer: Vectorizer) -> None:
    assert json.loads((folder / SPEC_FILE).read_text()) == {
        "format": 1, "vectorizer": vectorizer.fingerprint, "dim": 8, "token_dim": 4, "phrases": len(PHRASES),
    }  # fmt: skip


@pytest.mark.parametrize("twins", [2, 5])
def test_cold_tells_apart_keys_whose_first_half_collides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twins: int
) -> None:
    """Real keys that agree in 64 bits cannot be found, so these are made by hand."""
    keys = {f"twin {i}": bytes(8) + bytes([i]) * 24 for i in range(twins)} | {"other": b"\x01" * 32}
    monkeypatch.setattr(cold, "key", lambda fingerprint, phrase: keys[phrase])
    written = {phrase: Encoding(np.full(2, i, np.float32)) for i, phrase in enumerate(keys)}
    cold.write(tmp_path, written.items(), fingerprint="", dim=2, token_dim=1)
    table = ColdTable(tmp_path)
    found = {phrase: table.get(phrase_key) for phrase, phrase_key in keys.items()}
    assert {phrase: encoding and encoding.sentence.tolist() for phrase, encoding in found.items()} == {
        phrase: encoding.sentence.tolist() for phrase, encoding in written.items()
    }
    assert table.get(bytes(8) + b"\xee" * 24) is None


def cut(name: str, by: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-by])

    return harm


def grow(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(bytes(8))

    return harm


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def respec(**changes: object) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        spec = json.loads((folder / SPEC_FILE).read_text())
        (folder / SPEC_FILE).write_text(json.dumps(spec | changes))

    return harm


def reend(*ends: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        stored = np.fromfile(folder / ENDS_FILE, "<u8")
        stored[: len(ends)] = ends
        stored.tofile(folder / ENDS_FILE)

    return harm


def last_end(value: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        stored = np.fromfile(folder / ENDS_FILE, "<u8")
        stored[-1] = value
        stored.tofile(folder / ENDS_FILE)

    return harm


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        pytest.param(cut(KEYS_FILE, 1), "keys.bin of 111 bytes, expected 112", id="keys-cut"),
        pytest.param(cut(KEYS_FILE, 16), "keys.bin of 96 bytes, expected 112", id="a-key-less"),
        pytest.param(grow(KEYS_FILE), "keys.bin of 120 bytes, expected 112", id="keys-grown"),
        pytest.param(cut(ENDS_FILE, 1), "ends.bin of 55 bytes, expected 56", id="ends-cut"),
        pytest.param(grow(ENDS_FILE), "ends.bin of 64 bytes, expected 56", id="ends-grown"),
        pytest.param(cut(RECORDS_FILE, 1), "records.bin of", id="records-cut"),
        pytest.param(grow(RECORDS_FILE), "records.bin of", id="records-grown"),
        pytest.param(remove(KEYS_FILE), "keys.bin of -1 bytes", id="no-keys"),
        pytest.param(remove(ENDS_FILE), "ends.bin of -1 bytes", id="no-ends"),
        pytest.param(remove(RECORDS_FILE), "records.bin of -1 bytes", id="no-records"),
        pytest.param(remove(SPEC_FILE), "no valid cold.json", id="no-spec"),
        pytest.param(cut(SPEC_FILE, 9), "no valid cold.json", id="spec-cut"),
        pytest.param(respec(format=2), "no valid cold.json", id="another-format"),
        pytest.param(respec(colour="blue"), "no valid cold.json", id="unknown-field"),
        pytest.param(respec(phrases=6), "keys.bin of 112 bytes, expected 96", id="fewer-phrases"),
        pytest.param(respec(phrases=-7), "keys.bin of 112 bytes, expected -112", id="negative-phrases"),
        pytest.param(last_end(2**63), "records.bin of", id="end-beyond-any-file"),
        pytest.param(reend(10**6), "records out of order", id="ends-out-of-order"),
    ],
)
def test_cold_refuses(folder: Path, harm: Callable[[Path], None], found: str) -> None:
    assert len(ColdTable(folder)) == len(PHRASES)  # the control: unharmed it loads
    harm(folder)
    with pytest.raises(EngineRefused, match=f"cold cache: found {found}") as refused:
        ColdTable(folder)
    assert refused.value.part == "cold cache"
    assert "nlu cache build" in str(refused.value)


def test_cold_record_of_another_width_is_a_miss(folder: Path, vectorizer: Vectorizer) -> None:
    respec(dim=9)(folder)
    assert ColdTable(folder).get(record.key(vectorizer.fingerprint, "hello")) is None


def test_cold_tables_of_one_folder_share_nothing_that_changes(
    folder: Path, vectorizer: Vectorizer, tmp_path: Path
) -> None:
    """An answer stays what it was when its table, and the files below it, are gone: nothing maps the record itself."""
    table = ColdTable(folder)
    found = table.get(record.key(vectorizer.fingerprint, "hello"))
    assert found is not None
    before = found.sentence.tobytes()
    del table
    shutil.rmtree(folder)
    assert found.sentence.tobytes() == before
