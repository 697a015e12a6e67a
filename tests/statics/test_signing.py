"""statics.signing: who vouches for a manifest."""

import base64
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from statics.errors import SignatureInvalid
from statics.signing import Keyring, generate_key, key_id, load_private, save_private, sign, verify

RAW = b'{"format": 1}\n'


def both(first: bytes, second: bytes) -> bytes:
    """One signature file of two."""
    return json.dumps(
        {"signatures": [*json.loads(first)["signatures"], *json.loads(second)["signatures"]]}
    ).encode()


def test_signing_accepts_a_trusted_signature(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    verify(RAW, sign(RAW, key), keyring)


def test_signing_accepts_one_trusted_among_others(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    verify(RAW, both(sign(RAW, generate_key()[0]), sign(RAW, key)), keyring)


def test_signing_refuses_an_unknown_key(key: Ed25519PrivateKey) -> None:
    ring = Keyring.of(generate_key()[1])
    with pytest.raises(
        SignatureInvalid, match=f"signatures by unknown keys {key_id(key.public_key())}.*keyring"
    ):
        verify(RAW, sign(RAW, key), ring)


def test_signing_refuses_a_stolen_key_id(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    forged = json.loads(sign(RAW, generate_key()[0]))
    forged["signatures"][0]["key_id"] = key_id(key.public_key())
    with pytest.raises(SignatureInvalid, match="not over this manifest"):
        verify(RAW, json.dumps(forged).encode(), keyring)


def test_signing_refuses_a_wrong_signature_beside_a_good_one(key: Ed25519PrivateKey) -> None:
    other, other_public = generate_key()
    ring = Keyring.of(key.public_key(), other_public)
    verify(RAW, both(sign(RAW, key), sign(RAW, other)), ring)
    with pytest.raises(SignatureInvalid, match=key_id(other_public)):
        verify(RAW, both(sign(RAW, key), sign(b"else", other)), ring)


def test_signing_refuses_every_changed_manifest_byte(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    signature = sign(RAW, key)
    for at in range(len(RAW)):
        changed = bytearray(RAW)
        changed[at] ^= 1
        with pytest.raises(SignatureInvalid):
            verify(bytes(changed), signature, keyring)


def test_signing_refuses_every_changed_signature_byte(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    signature = sign(RAW, key)
    for at in range(len(signature)):
        for bit in (1, 2, 16, 32):  # 32 turns letters to the other case
            changed = bytearray(signature)
            changed[at] ^= bit
            with pytest.raises(SignatureInvalid):
                verify(RAW, bytes(changed), keyring)


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"{}",
        b'{"signatures": []}',
        b'{"signatures": [], "signatures": []}',
        b'{"signatures": [{"key_id": "0123456789abcdef", "signature": ""}]}',
        b'{"signatures": [' + b" " * 70_000 + b"]}",
    ],
)
def test_signing_refuses_files_that_are_none(file: bytes, keyring: Keyring) -> None:
    with pytest.raises(SignatureInvalid, match="expected a signature file"):
        verify(RAW, file, keyring)


def test_signing_key_id_is_the_start_of_the_digest() -> None:
    public = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    assert key_id(public) == "139e3940e64b5491"


def test_signing_private_key_survives_the_disk_for_its_owner_only(
    tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    save_private(key, tmp_path / "key.pem")
    assert load_private(tmp_path / "key.pem").private_bytes_raw() == key.private_bytes_raw()
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


def test_signing_never_overwrites_a_private_key(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    save_private(key, tmp_path / "key.pem")
    with pytest.raises(FileExistsError):
        save_private(generate_key()[0], tmp_path / "key.pem")
    assert load_private(tmp_path / "key.pem").private_bytes_raw() == key.private_bytes_raw()


def test_signing_refuses_keys_of_another_kind(tmp_path: Path) -> None:
    pem = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        load_private(tmp_path / "key.pem")


def test_signing_keyring_survives_the_disk(tmp_path: Path, key: Ed25519PrivateKey, keyring: Keyring) -> None:
    keyring.save(tmp_path / "keys.json")
    verify(RAW, sign(RAW, key), Keyring.load(tmp_path / "keys.json"))


@pytest.mark.parametrize(
    "entries",
    [
        '{"0123456789abcdef": "' + base64.b64encode(bytes(32)).decode() + '"}',  # the id of another key
        '{"139e3940e64b5491": "AAAA"}',
        '{"139e3940e64b5491": 1}',
        "[]",
        "",
    ],
)
def test_signing_keyring_refuses_what_is_none(tmp_path: Path, entries: str) -> None:
    (tmp_path / "keys.json").write_text(entries)
    with pytest.raises(SignatureInvalid, match="keyring"):
        Keyring.load(tmp_path / "keys.json")


def test_signing_keyring_says_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid, match="No such file"):
        Keyring.load(tmp_path / "keys.json")
