"""Join tokens: one word that lets a machine into a pool.

A token names the broker's key and addresses, so that a joining machine can reach the right broker and notice a wrong
one. It also carries a role and an expiry, signed by the broker's key. Anybody who holds the token may join until it
expires, so treat it like a password. The broker can check a token without keeping a list of tokens.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from fusionai.errors import AuthenticationError, ConfigError, ProtocolError, TokenError
from fusionai.network.identity import Identity, PeerId, peer_id, public_key_bytes, verify
from fusionai.units.addresses import split_address

PREFIX = "fusion-"

_LONGEST = 4096
_CONTEXT = b"FusionAI join token 1\n"
"""Prefix of the signed bytes, so that no other signature of the broker's key can pass for a token."""


class _Claims(NamedTuple):
    """The signed part of a token, in the order of the encoding."""

    broker: bytes
    addresses: tuple[str, ...]
    role: str
    expires_at_s: float
    nonce: bytes


class _Wire(NamedTuple):
    claims: bytes
    signature: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode_wire = msgspec.msgpack.Decoder(_Wire).decode
_decode_claims = msgspec.msgpack.Decoder(_Claims).decode


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """A capability to join a broker's pool."""

    broker: PeerId
    addresses: tuple[str, ...]
    """Where the broker listens, as "host:port"."""
    role: str
    expires_at_s: float
    """Unix time."""
    nonce: bytes
    signature: bytes

    @classmethod
    def issue(
        cls, identity: Identity, addresses: Sequence[str], role: str = "member", lifetime_s: float = 86_400.0
    ) -> JoinToken:
        """Return a token signed by the broker's identity.

        Raises:
            ConfigError: an address is malformed, there is none, or the lifetime is not above 0.
        """
        if not addresses:
            raise ConfigError("a join token needs at least one address of the broker")
        for address in addresses:
            split_address(address)
        if not lifetime_s > 0:
            raise ConfigError(f"the lifetime of a join token must be above 0 s, got {lifetime_s}")
        claims = _Claims(
            broker=public_key_bytes(identity.peer_id),
            addresses=tuple(addresses),
            role=role,
            expires_at_s=time.time() + lifetime_s,
            nonce=secrets.token_bytes(8),
        )
        return cls(
            broker=identity.peer_id,
            addresses=claims.addresses,
            role=claims.role,
            expires_at_s=claims.expires_at_s,
            nonce=claims.nonce,
            signature=identity.sign(_CONTEXT + _encode(claims)),
        )

    def encode(self) -> str:
        """Return the token as one word."""
        raw = _encode(_Wire(self._claims(), self.signature))
        return PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")

    @classmethod
    def decode(cls, text: str, *, now_s: float | None = None) -> JoinToken:
        """Return the token that `text` encodes, checked for signature and expiry.

        A broker must compare `broker` with its own key too: a token is only ever signed by the broker it names.

        Args:
            text: what `encode` returned; white space round it is ignored.
            now_s: Unix time to judge the expiry by; the machine's clock if not given.

        Raises:
            TokenError: malformed, forged or expired.
        """
        token = cls._parse(text.strip())
        try:
            verify(token.broker, token.signature, _CONTEXT + token._claims())
        except AuthenticationError as error:
            raise TokenError(
                "the join token is forged or was changed: its signature is not its broker's; copy it again from "
                "the broker's output"
            ) from error
        late_s = (time.time() if now_s is None else now_s) - token.expires_at_s
        if late_s >= 0:
            raise TokenError(
                f"the join token expired {_ago(late_s)} ago; ask the broker's operator for a new one (or "
                "correct this machine's clock)"
            )
        return token

    @classmethod
    def _parse(cls, text: str) -> JoinToken:
        malformed = "the join token is malformed: "
        remedy = "; copy the whole word from the broker's output"
        if not text.startswith(PREFIX):
            raise TokenError(f"{malformed}it starts with {text[:12]!r}, not with {PREFIX!r}{remedy}")
        if len(text) > _LONGEST:
            raise TokenError(f"{malformed}it has {len(text)} characters, at most {_LONGEST} are allowed{remedy}")
        body = text.removeprefix(PREFIX)
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            wire = _decode_wire(raw)
            claims = _decode_claims(wire.claims)
            broker = peer_id(claims.broker)
            for address in claims.addresses:
                split_address(address)
        except (binascii.Error, ValueError, msgspec.MsgspecError, ProtocolError, ConfigError) as error:
            raise TokenError(f"{malformed}{error}{remedy}") from error
        return cls(
            broker=broker,
            addresses=claims.addresses,
            role=claims.role,
            expires_at_s=claims.expires_at_s,
            nonce=claims.nonce,
            signature=wire.signature,
        )

    def _claims(self) -> bytes:
        return _encode(_Claims(public_key_bytes(self.broker), self.addresses, self.role, self.expires_at_s, self.nonce))


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
