"""statics.signing: who vouches for a manifest."""

import base64
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from statics.errors import SignatureInvalid
from statics.signing import (
    Keyring,
    Signer,
    generate_key,
    join,
    key_id,
    load_private,
    save_private,
    sign,
    signers,
    verify,
)

RAW = b'{"format": 1}\n'


def test_signing_accepts_a_trusted_signature(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    verify(RAW, sign(RAW, key), keyring)


def test_signing_accepts_one_trusted_among_others(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    verify(RAW, join(sign(RAW, generate_key()[0]), sign(RAW, key)), keyring)


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
    verify(RAW, join(sign(RAW, key), sign(RAW, other)), ring)
    with pytest.raises(SignatureInvalid, match=key_id(other_public)):
        verify(RAW, join(sign(RAW, key), sign(b"else", other)), ring)


def test_signing_needs_as_many_keys_as_the_deployment_asks_for(key: Ed25519PrivateKey) -> None:
    second, third, stranger = (generate_key()[0] for _ in range(3))
    ring = Keyring.of(key.public_key(), second.public_key(), third.public_key())
    two = sign(RAW, second, sign(RAW, key))
    verify(RAW, two, ring, signatures=2)
    verify(RAW, sign(RAW, third, two), ring, signatures=3)
    for short in (sign(RAW, key), sign(RAW, stranger, sign(RAW, key))):
        with pytest.raises(SignatureInvalid, match="found signatures of 1 trusted keys.*expected those of 2"):
            verify(RAW, short, ring, signatures=2)
        verify(RAW, short, ring)  # the negative control: one is enough where nobody asks for two


def test_signing_counts_a_key_once(key: Ed25519PrivateKey) -> None:
    ring = Keyring.of(key.public_key(), generate_key()[1])
    twice = json.loads(sign(RAW, key))
    twice["signatures"] *= 2
    with pytest.raises(SignatureInvalid, match="1 trusted"):
        verify(RAW, json.dumps(twice).encode(), ring, signatures=2)


def test_signing_again_with_a_key_changes_nothing(key: Ed25519PrivateKey) -> None:
    other = generate_key()[0]
    once = sign(RAW, other, sign(RAW, key))
    assert sign(RAW, key, once) == sign(RAW, other, once) == sign(RAW, key, sign(RAW, other)) == once


def test_signing_beside_something_else_is_refused(key: Ed25519PrivateKey) -> None:
    with pytest.raises(SignatureInvalid, match="expected a signature file"):
        sign(RAW, key, b"{}")


def test_signing_join_takes_the_first_ones_word(key: Ed25519PrivateKey, keyring: Keyring) -> None:
    good, bad = sign(RAW, key), sign(b"else", key)
    verify(RAW, join(good, bad), keyring)
    with pytest.raises(SignatureInvalid):
        verify(RAW, join(bad, good), keyring)


def test_signing_a_key_is_replaced_without_a_moment_of_distrust() -> None:
    """The order of docs/operating-releases.md: both sign, both are trusted, and then the old one is dropped."""
    old, new = generate_key()[0], generate_key()[0]
    before, between, after = (
        Keyring.of(old.public_key()),
        Keyring.of(old.public_key(), new.public_key()),
        Keyring.of(new.public_key()),
    )
    both = sign(RAW, new, sign(RAW, old))
    for ring in (before, between, after):
        verify(RAW, both, ring)
    with pytest.raises(SignatureInvalid, match="unknown keys"):
        verify(RAW, sign(RAW, old), after)  # revoked is what is no longer in the keyring


def test_signing_signers_tells_true_false_and_unknown(key: Ed25519PrivateKey) -> None:
    wrong, stranger = generate_key()[0], generate_key()[0]
    ring = Keyring.of(key.public_key(), wrong.public_key())
    file = sign(RAW, stranger, join(sign(RAW, key), sign(b"else", wrong)))
    assert set(signers(RAW, file, ring)) == {
        Signer(key_id(key.public_key()), True),
        Signer(key_id(wrong.public_key()), False),
        Signer(key_id(stranger.public_key()), None),
    }


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


@pytest.mark.parametrize("secret", [b"a password", None])
def test_signing_refuses_keys_that_cannot_be_read(tmp_path: Path, secret: bytes | None) -> None:
    pem = b"no key at all"
    if secret:
        lock = BestAvailableEncryption(secret)
        pem = generate_key()[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    (tmp_path / "key.pem").write_bytes(pem)
    with pytest.raises(
        ValueError, match="key.pem: found .*expected an Ed25519 key in PEM without a password"
    ):
        load_private(tmp_path / "key.pem")


def test_signing_keyring_holds_several_keys_and_forgets_the_removed(tmp_path: Path) -> None:
    keys = [generate_key()[0] for _ in range(3)]
    path = tmp_path / "keys.json"
    Keyring.of(*(each.public_key() for each in keys)).save(path)
    for each in keys:
        verify(RAW, sign(RAW, each), Keyring.load(path))
    entries = json.loads(path.read_text())
    del entries[key_id(keys[0].public_key())]
    path.write_text(json.dumps(entries))
    verify(RAW, sign(RAW, keys[1]), Keyring.load(path))
    with pytest.raises(SignatureInvalid, match="unknown keys"):
        verify(RAW, sign(RAW, keys[0]), Keyring.load(path))


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
