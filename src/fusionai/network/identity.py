"""A node is an Ed25519 key: its public half is its name on the network, its private half never leaves its disk."""

from __future__ import annotations

import logging
import os
import secrets
import ssl
import stat
from pathlib import Path
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fusionai.errors import AuthenticationError, ConfigError, ProtocolError, StorageError
from fusionai.network.certificates import tls_context

log = logging.getLogger(__name__)

PeerId = NewType("PeerId", str)
"""A node's raw Ed25519 public key, as 64 lower-case hexadecimal digits."""


def peer_id(public_key: bytes) -> PeerId:
    """Return the id of a raw 32-byte public key."""
    if len(public_key) != 32:
        raise ProtocolError(f"a public key has 32 bytes, got {len(public_key)}")
    return PeerId(public_key.hex())


def public_key_bytes(peer: str) -> bytes:
    """Return the raw 32 bytes of a peer id.

    Raises:
        ProtocolError: the text is not a peer id.
    """
    if len(peer) != 64 or any(digit not in "0123456789abcdef" for digit in peer):
        raise ProtocolError(f"{peer[:80]!r} is not a peer id (64 lower-case hexadecimal digits)")
    return bytes.fromhex(peer)


def verify(peer: PeerId, signature: bytes, message: bytes) -> None:
    """Check that `signature` over `message` was made by `peer`.

    Raises:
        AuthenticationError: it was not.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key_bytes(peer)).verify(signature, message)
    except (InvalidSignature, ValueError, ProtocolError) as error:
        raise AuthenticationError(f"the signature was not made by {peer[:12]}") from error


class Identity:
    """This node's key, and the TLS contexts made from it."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.peer_id: PeerId = peer_id(private_key.public_key().public_bytes_raw())

    @classmethod
    def ephemeral(cls) -> Identity:
        """Return a new identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Return the identity kept at `path`; make it first when there is none.

        Several processes may do so at once: all get the same identity. The file is readable by its owner
        only (on Windows, by whom the folder's rights allow).

        Raises:
            ConfigError: the file is there, but holds no Ed25519 key.
            StorageError: the file cannot be read or written.
        """
        try:
            if not path.exists():
                _create(path)
            pem = path.read_bytes()
            _close_to_others(path)
        except OSError as error:
            raise StorageError(
                f"the identity {path} cannot be read or written: {error.strerror or error}; free the disk, "
                "correct the rights of the folder, or choose another folder"
            ) from error
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} does not hold a private key; restore it from a backup, or move it away to get a new "
                "identity (peers will see a new node)"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a key that is not Ed25519; move it away to get a new identity")
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of `message`."""
        return self._private_key.sign(message)

    def tls(self, *, server: bool) -> ssl.SSLContext:
        """Return a TLS 1.3 context that proves this identity and demands one of the peer."""
        return tls_context(self._private_key, server=server)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id[:12]})"


def _create(path: Path) -> None:
    """Put a new key at `path` in one step, unless another process was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A hard link fails when the name is taken, so the first process wins and the others read its key.
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:
            # File systems without hard links (FAT, some network shares): rename; the last process wins.
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _close_to_others(path: Path) -> None:
    if os.name != "posix":
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        log.warning("identity %s was readable by others (mode %o): closed it; its key may be known", path, mode)
        path.chmod(0o600)
