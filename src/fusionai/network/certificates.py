"""TLS 1.3 with keys as identities: no certificate authority, no host name, no file to install.

The standard `ssl` module cannot accept any certificate and leave the check of its key to us: with verification off it
does not even ask a dialler for a certificate. So every node's certificate is issued by one issuer whose private key
is *public*: it is derived from the constant below. A certificate of that issuer proves nothing about its owner. It
only makes `ssl` accept every well-formed certificate. TLS 1.3 then proves, in its CertificateVerify message, that the
other side holds the private key of the certificate it showed. Afterwards, and before any application byte is sent or
read, the key alone decides who may be at the other end: the dialler compares it with the key that it wants to reach,
and the listener asks its `authorise`.

Which cipher is used is OpenSSL's choice (AES-256-GCM first); Python before 3.15 cannot reorder the ciphers of
TLS 1.3.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import ssl
import tempfile
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from fusionai.errors import AuthenticationError

ALPN = "fusionai"
"""The name of our protocol in the handshake. It tells a node from a client or server of another protocol."""

_ISSUER_SEED = hashlib.sha256(b"FusionAI: this issuer carries no trust").digest()
# Fixed dates far away instead of "now": a home machine's clock may be wrong by years, and validity means nothing here.
_NOT_BEFORE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2999, 12, 31, tzinfo=datetime.UTC)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(public_key: Ed25519PublicKey, subject: str, *, authority: bool) -> x509.Certificate:
    issuer_key = Ed25519PrivateKey.from_private_bytes(_ISSUER_SEED)
    serial = int.from_bytes(hashlib.sha256(public_key.public_bytes_raw()).digest()[:16], "big") >> 1 or 1
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name("FusionAI public issuer"))
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return builder.sign(issuer_key, None)


@cache
def _issuer_pem() -> str:
    key = Ed25519PrivateKey.from_private_bytes(_ISSUER_SEED).public_key()
    certificate = _certificate(key, "FusionAI public issuer", authority=True)
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def tls_context(private_key: Ed25519PrivateKey, *, server: bool) -> ssl.SSLContext:
    """Return a TLS 1.3 context that shows `private_key` and requires a key of the other side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=_issuer_pem())
    context.set_alpn_protocols([ALPN])
    if server:
        # A resumed session would skip the proof of the key.
        context.num_tickets = 0
    _load(context, private_key)
    return context


def _load(context: ssl.SSLContext, private_key: Ed25519PrivateKey) -> None:
    # `ssl` reads keys from files only: write one for a moment, encrypted under a password that is never stored.
    password = secrets.token_bytes(16).hex().encode("ascii")
    certificate = _certificate(private_key.public_key(), "FusionAI node", authority=False)
    pem = private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    with tempfile.TemporaryDirectory(prefix="fusionai-") as folder:
        path = Path(folder) / "node.pem"
        path.write_bytes(pem)
        context.load_cert_chain(path, password=password)


def peer_public_key(tls: ssl.SSLObject | ssl.SSLSocket) -> bytes:
    """Return the 32 raw bytes of the Ed25519 key that the other side has proved to hold.

    Raises:
        AuthenticationError: it showed no certificate, or one with a key of another kind.
    """
    der = tls.getpeercert(binary_form=True)
    if der is None:
        raise AuthenticationError("the other side showed no certificate")
    key = x509.load_der_x509_certificate(der).public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise AuthenticationError("the other side's certificate holds a key that is not Ed25519")
    return key.public_bytes_raw()
