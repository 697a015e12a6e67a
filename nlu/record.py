"""The stored form of an Encoding: what the cold table and Redis keep, and the key they keep it under. Never pickle."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from annotators.annotator import Encoding

SCHEMA = b"chorus-encoding-1"
KEY_BYTES = 32
_HEADER = struct.Struct("<2sHHH")  # magic, dim, token_dim, tokens
_MAGIC = b"E1"
_NO_TOKENS = 0xFFFF


def key(fingerprint: str, phrase: str) -> bytes:
    """BLAKE2b-256 of the schema, the vectorizer's fingerprint and the whole phrase: another vectorizer is another key."""
    digest = hashlib.blake2b(SCHEMA, digest_size=KEY_BYTES)
    digest.update(bytes.fromhex(fingerprint))
    digest.update(phrase.encode())
    return digest.digest()


def pack(encoding: Encoding) -> bytes:
    """Header, float16 sentence vector, float16 token vectors, uint16 offsets; little-endian. Lossless: see Encoding."""
    sentence = encoding.sentence.astype("<f2").tobytes()
    if encoding.tokens is None or encoding.offsets is None:
        return _HEADER.pack(_MAGIC, len(encoding.sentence), 0, _NO_TOKENS) + sentence
    count, width = encoding.tokens.shape
    header = _HEADER.pack(_MAGIC, len(encoding.sentence), width, count)
    return (
        header + sentence + encoding.tokens.astype("<f2").tobytes() + encoding.offsets.astype("<u2").tobytes()
    )


def unpack(record: bytes | memoryview, *, dim: int, token_dim: int) -> Encoding | None:
    """The Encoding in a record, or None where the record is not one of this width (a stranger's value is a miss)."""
    if len(record) < _HEADER.size:
        return None
    magic, found_dim, found_token_dim, count = _HEADER.unpack_from(record)
    with_tokens = count != _NO_TOKENS
    expected = _HEADER.size + 2 * found_dim + (count * (2 * found_token_dim + 4) if with_tokens else 0)
    if magic != _MAGIC or found_dim != dim or len(record) != expected:
        return None
    sentence = np.frombuffer(record, "<f2", dim, _HEADER.size).astype(np.float32)
    if not with_tokens:
        return Encoding(sentence)
    if found_token_dim != token_dim:
        return None
    start = _HEADER.size + 2 * dim
    tokens = (
        np.frombuffer(record, "<f2", count * token_dim, start).astype(np.float32).reshape(count, token_dim)
    )
    offsets = (
        np.frombuffer(record, "<u2", count * 2, start + 2 * count * token_dim)
        .astype(np.int32)
        .reshape(count, 2)
    )
    return Encoding(sentence, tokens, offsets)
