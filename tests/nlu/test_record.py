"""nlu.record: the stored form of an Encoding, to the bit and to the byte, and the key it is stored under."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from annotators.annotator import Encoding
from nlu import record

FINGERPRINT = "0f" * 32


def made(*, dim: int = 3, words: int | None = 2, width: int = 2, seed: int = 0) -> Encoding:
    """An Encoding as the vectorizer gives it: every number a float16; `words` None means no token vectors."""
    random = np.random.default_rng(seed)

    def vectors(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random.standard_normal(shape).astype(np.float16).astype(np.float32)

    if words is None:
        return Encoding(vectors(dim))
    offsets = np.array([[4 * i, 4 * i + 3] for i in range(words)], np.int32).reshape(words, 2)
    return Encoding(vectors(dim), vectors(words, width), offsets)


def assert_same(found: Encoding | None, expected: Encoding) -> None:
    assert found is not None
    for one, other in (
        (found.sentence, expected.sentence),
        (found.tokens, expected.tokens),
        (found.offsets, expected.offsets),
    ):
        if other is None:
            assert one is None
        else:
            assert one is not None
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("words", [None, 0, 1, 7, 300], ids=lambda words: f"{words}-words")
def test_record_comes_back_bit_for_bit(words: int | None) -> None:
    encoding = made(words=words)
    assert_same(record.unpack(record.pack(encoding), dim=3, token_dim=2), encoding)


@settings(deadline=None, derandomize=True)
@given(arrays.arrays(np.float16, 5), arrays.arrays(np.float16, (3, 2)), arrays.arrays(np.uint16, (3, 2)))
def test_record_keeps_every_float16(
    sentence: np.ndarray[tuple[int], np.dtype[np.float16]],
    tokens: np.ndarray[tuple[int, int], np.dtype[np.float16]],
    offsets: np.ndarray[tuple[int, int], np.dtype[np.uint16]],
) -> None:
    encoding = Encoding(sentence.astype(np.float32), tokens.astype(np.float32), offsets.astype(np.int32))
    packed = record.pack(encoding)
    unpacked = record.unpack(packed, dim=5, token_dim=2)
    assert unpacked is not None
    np.testing.assert_array_equal(unpacked.sentence, encoding.sentence)  # NaN equals NaN here
    assert unpacked.tokens is not None
    np.testing.assert_array_equal(unpacked.tokens, encoding.tokens)
    np.testing.assert_array_equal(unpacked.offsets, encoding.offsets)


def test_record_bytes_are_as_described() -> None:
    encoding = Encoding(
        np.array([1.0, -2.0], np.float32), np.array([[0.5], [0.25]], np.float32), np.array([[0, 4], [5, 700]], np.int32)
    )  # fmt: skip
    assert record.pack(encoding) == b"E1" + struct.pack(
        "<3H 2e 2e 4H", 2, 1, 2, 1.0, -2.0, 0.5, 0.25, 0, 4, 5, 700
    )


def test_record_without_tokens_says_so() -> None:
    assert record.pack(made(words=None))[:8] == b"E1" + struct.pack("<3H", 3, 0, 0xFFFF)


def test_record_unpacks_from_a_memoryview() -> None:
    encoding = made()
    assert_same(record.unpack(memoryview(record.pack(encoding)), dim=3, token_dim=2), encoding)


def test_record_without_tokens_fits_every_token_width() -> None:
    encoding = made(words=None)
    assert_same(record.unpack(record.pack(encoding), dim=3, token_dim=99), encoding)


@pytest.mark.parametrize(
    ("value", "dim", "token_dim"),
    [
        pytest.param(b"", 3, 2, id="empty"),
        pytest.param(b"E1", 3, 2, id="half-a-header"),
        pytest.param(record.pack(made())[:-1], 3, 2, id="one-byte-short"),
        pytest.param(record.pack(made())[:8], 3, 2, id="header-alone"),
        pytest.param(record.pack(made()) + b"\0", 3, 2, id="one-byte-long"),
        pytest.param(b"E2" + record.pack(made())[2:], 3, 2, id="another-magic"),
        pytest.param(record.pack(made()), 4, 2, id="another-dim"),
        pytest.param(record.pack(made()), 3, 1, id="another-token-dim"),
        pytest.param(record.pack(made(words=None))[:-2], 3, 2, id="short-without-tokens"),
        pytest.param(b"\x80\x04K\x01.", 3, 2, id="a-pickle"),
        pytest.param(b"\xff" * 64, 3, 2, id="ones"),
    ],
)
def test_record_of_a_stranger_is_a_miss(value: bytes, dim: int, token_dim: int) -> None:
    assert record.unpack(record.pack(made()), dim=3, token_dim=2) is not None  # the control
    assert record.unpack(value, dim=dim, token_dim=token_dim) is None


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_record_never_raises_on_bytes(value: bytes) -> None:
    record.unpack(value, dim=3, token_dim=2)
    record.unpack(b"E1" + value, dim=3, token_dim=2)


def test_record_key_is_blake2b_of_schema_fingerprint_and_phrase() -> None:
    twin = hashlib.blake2b(
        b"chorus-encoding-1" + bytes.fromhex(FINGERPRINT) + "ёж".encode(), digest_size=32
    ).digest()
    assert record.key(FINGERPRINT, "ёж") == twin


@pytest.mark.parametrize(
    ("fingerprint", "phrase"),
    [
        ("0e" * 32, "stop"),
        (FINGERPRINT, "stop "),
        (FINGERPRINT, "Stop"),
        (FINGERPRINT, "stopp"),
        (FINGERPRINT, ""),
    ],
)
def test_record_key_differs_for(fingerprint: str, phrase: str) -> None:
    assert record.key(FINGERPRINT, "stop") == record.key(FINGERPRINT, "stop")
    assert record.key(fingerprint, phrase) != record.key(FINGERPRINT, "stop")


def test_record_key_has_no_seam_between_fingerprint_and_phrase() -> None:
    assert record.key("41" * 32, "Ab") != record.key("41" * 31 + "42", "ab")
