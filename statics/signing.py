"""Ed25519 signatures over the raw bytes of a manifest; the keys that are trusted come from the deployment.

A signature file holds the signatures of any number of keys, so that a key can be replaced while old and new pods run,
and so that a deployment can ask for those of several people.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import Field

from statics import document
from statics.document import Document, canonical_json, strict_json
from statics.errors import ManifestInvalid, SignatureInvalid
from statics.manifest import SIGNATURE

SIGNATURE_LIMIT = 64 * 1024  # bytes, of a signature file and of a keyring


class _Signature(Document):
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    # 64 bytes in base64, the unused bits of the last letter 0: any changed character is refused.
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{85}[AQgw]==$")]


class _Signatures(Document):
    signatures: tuple[_Signature, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Signer:
    """A key that a signature file names; `vouches` is None where the keyring does not have it, so nobody can say."""

    key_id: str
    vouches: bool | None


@dataclass(frozen=True)
class Keyring:
    """The public keys this deployment trusts, by key id; they come with the image or its configuration.

    A key that is taken out is trusted no longer: there is no other list of revoked keys.
    """

    keys: Mapping[str, Ed25519PublicKey]

    @classmethod
    def of(cls, *publics: Ed25519PublicKey) -> "Keyring":
        return cls({key_id(public): public for public in publics})

    @classmethod
    def load(cls, path: Path) -> "Keyring":
        """Read `{key_id: base64 of the raw public key}`."""
        try:
            entries = strict_json(path.read_bytes(), SIGNATURE_LIMIT)
            publics = [_public(str(text)) for text in entries.values()]
            ring = cls.of(*publics)
            if list(ring.keys) != list(entries):
                raise ValueError(f"ids {', '.join(entries)} for keys whose ids are {', '.join(ring.keys)}")
        except (ValueError, OSError) as error:
            raise SignatureInvalid(
                part=f"keyring {path}",
                found=str(error),
                expected='{"<key id>": "<base64 of the 32 bytes of an Ed25519 public key>"}',
                remedy="nlu bundle keygen writes one; mount it with the deployment",
            ) from error
        return ring

    def save(self, path: Path) -> None:
        path.write_bytes(canonical_json({name: _base64(public) for name, public in self.keys.items()}))


def generate_key() -> tuple[Ed25519PrivateKey, Ed25519PublicKey]:
    private = Ed25519PrivateKey.generate()
    return private, private.public_key()


def save_private(private: Ed25519PrivateKey, path: Path) -> None:
    """Write the key as PEM for its owner alone; an existing file is never overwritten (FileExistsError)."""
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)


def load_private(path: Path) -> Ed25519PrivateKey:
    """A key that `save_private` wrote; ValueError for anything else."""
    try:
        private = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise ValueError(
            f"{path}: found {error}, expected an Ed25519 key in PEM without a password; "
            "make one with nlu bundle keygen"
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ValueError(
            f"{path} holds a {type(private).__name__}, not an Ed25519 key; make one with nlu bundle keygen"
        )
    return private


def key_id(public: Ed25519PublicKey) -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def sign(raw: bytes, private: Ed25519PrivateKey, beside: bytes | None = None) -> bytes:
    """The content of `manifest.sig` for the manifest `raw`; the signatures of other keys in `beside` stay.

    SignatureInvalid where `beside` is no signature file.
    """
    signature = base64.b64encode(private.sign(raw)).decode()
    ours = document.dump(
        _Signatures(signatures=(_Signature(key_id=key_id(private.public_key()), signature=signature),))
    )
    return join(ours, beside) if beside is not None else ours


def join(first: bytes, second: bytes) -> bytes:
    """One signature file of two, the same whatever their order; of a key that is in both, the first one's counts."""
    entries = {entry.key_id: entry for raw in (second, first) for entry in _entries(raw)}
    return document.dump(_Signatures(signatures=tuple(entries[name] for name in sorted(entries))))


def signers(raw: bytes, signature_bytes: bytes, keyring: Keyring) -> tuple[Signer, ...]:
    """Who is said to have signed `raw`, and whether it is true; SignatureInvalid where this is no signature file."""
    return tuple(Signer(entry.key_id, _vouches(entry, raw, keyring)) for entry in _entries(signature_bytes))


def verify(raw: bytes, signature_bytes: bytes, keyring: Keyring, signatures: int = 1) -> None:
    """SignatureInvalid unless `signatures` trusted keys vouch for `raw`, and no trusted key's signature is wrong."""
    found = signers(raw, signature_bytes, keyring)
    for signer in found:
        if signer.vouches is False:
            raise SignatureInvalid(
                part=SIGNATURE,
                found=f"a signature of key {signer.key_id} that is not over this manifest",
                expected="a signature over the manifest's exact bytes",
                remedy="do not serve it: find out who changed it, then build, sign and publish it again",
            )
    trusted = sorted({signer.key_id for signer in found if signer.vouches})
    if not trusted:
        raise SignatureInvalid(
            part=SIGNATURE,
            found=f"signatures by unknown keys {', '.join(signer.key_id for signer in found)}",
            expected=f"one by {', '.join(keyring.keys) or 'a trusted key, and the deployment gives none'}",
            remedy="sign with a trusted key, or add the signer's public key to the deployment's keyring",
        )
    if len(trusted) < signatures:
        raise SignatureInvalid(
            part=SIGNATURE,
            found=f"signatures of {len(trusted)} trusted keys, {', '.join(trusted)}",
            expected=f"those of {signatures} of {', '.join(keyring.keys)}",
            remedy="add the missing ones with nlu bundle sign, and publish the bundle again",
        )


def _entries(signature_bytes: bytes) -> tuple[_Signature, ...]:
    try:
        return document.load(_Signatures, signature_bytes, part=SIGNATURE, limit=SIGNATURE_LIMIT).signatures
    except ManifestInvalid as error:
        raise SignatureInvalid(
            part=error.part,
            found=error.found,
            expected="a signature file",
            remedy="sign the bundle, and publish it again",
        ) from error


def _vouches(entry: _Signature, raw: bytes, keyring: Keyring) -> bool | None:
    public = keyring.keys.get(entry.key_id)
    if public is None:
        return None
    try:
        public.verify(base64.b64decode(entry.signature), raw)
    except InvalidSignature:
        return False
    return True


def _base64(public: Ed25519PublicKey) -> str:
    return base64.b64encode(public.public_bytes_raw()).decode()


def _public(text: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
