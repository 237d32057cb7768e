"""The key on disk: made once, private, the same for all, and useful errors when it is spoilt."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fusionai.errors import AuthenticationError, ConfigError, StorageError
from fusionai.network.identity import Identity, verify


def test_created_once_and_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "identity.pem"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.pem"]
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    assert key.public_key().public_bytes_raw().hex() == first.peer_id


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_file_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_processes_that_start_together_get_one_identity(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fusionai.network.identity import Identity\n"
        "sys.stdin.read(1)\n"
        "print(Identity.load_or_create(Path(sys.argv[1])).peer_id)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "identity.pem")]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({child.communicate("x", timeout=250)[0] for child in children}) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_signatures() -> None:
    one, other = Identity.ephemeral(), Identity.ephemeral()
    signature = one.sign(b"message")
    verify(one.peer_id, signature, b"message")
    for peer, text in ((one.peer_id, b"Message"), (other.peer_id, b"message")):
        with pytest.raises(AuthenticationError):
            verify(peer, signature, text)
    with pytest.raises(AuthenticationError):
        verify(one.peer_id, b"short", b"message")


def test_spoilt_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(b"not a key")
    with pytest.raises(ConfigError, match=r"identity\.pem does not hold a private key"):
        Identity.load_or_create(path)
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with pytest.raises(ConfigError, match="not Ed25519"):
        Identity.load_or_create(path)
    with pytest.raises(StorageError):
        Identity.load_or_create(path / "below-a-file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        Identity.load_or_create(tmp_path / "folder")
