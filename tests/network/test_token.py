"""Join tokens: one word, and no word but the broker's own works."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionai.errors import ConfigError, TokenError
from fusionai.network.identity import Identity
from fusionai.network.token import JoinToken
from fusionai.units.addresses import split_address

BROKER = Identity.ephemeral()


def issued(**options: object) -> JoinToken:
    return JoinToken.issue(BROKER, ["192.0.2.7:7700", "[2001:db8::1]:7700"], "compnode", **options)  # type: ignore[arg-type]


def test_round_trip_as_one_short_word() -> None:
    token = issued(lifetime_s=3600)
    word = token.encode()
    assert JoinToken.decode(f"  {word}\n") == token
    assert token.broker == BROKER.peer_id
    assert token.role == "compnode"
    assert token.addresses == ("192.0.2.7:7700", "[2001:db8::1]:7700")
    assert token.expires_at_s == pytest.approx(time.time() + 3600, abs=60)
    assert word.startswith("fusion-")
    assert len(word) < 260
    assert not set(word) & set(" \"'$&|;<>()`\\/+=")


def test_expiry() -> None:
    token = issued(lifetime_s=100)
    JoinToken.decode(token.encode(), now_s=token.expires_at_s - 1)
    with pytest.raises(TokenError, match="expired 2 hours ago"):
        JoinToken.decode(token.encode(), now_s=token.expires_at_s + 7200)


def test_forged() -> None:
    import msgspec

    longer = msgspec.structs.replace(issued(lifetime_s=10), expires_at_s=time.time() + 1e6)
    usurped = msgspec.structs.replace(issued(), broker=Identity.ephemeral().peer_id)
    for token in (longer, usurped):
        with pytest.raises(TokenError, match="forged"):
            JoinToken.decode(token.encode())


def test_every_single_change_is_noticed() -> None:
    word = issued().encode()
    source = random.Random(4)
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
    for place in range(len("fusion-"), len(word) - 1):
        other = source.choice([letter for letter in alphabet if letter != word[place]])
        with pytest.raises(TokenError):
            JoinToken.decode(word[:place] + other + word[place + 1 :])
    for cut in range(0, len(word) - 1, 7):
        with pytest.raises(TokenError):
            JoinToken.decode(word[:cut])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_nothing_but_token_errors(text: str) -> None:
    for word in (text, "fusion-" + text):
        with pytest.raises(TokenError, match="malformed"):
            JoinToken.decode(word)


def test_issue_checks_its_arguments() -> None:
    with pytest.raises(ConfigError, match="at least one address"):
        JoinToken.issue(BROKER, [], "member", 10)
    with pytest.raises(ConfigError, match="host:port"):
        JoinToken.issue(BROKER, ["nowhere"], "member", 10)
    with pytest.raises(ConfigError, match="above 0 s"):
        issued(lifetime_s=0)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:70000", "::1:80", "host:-1", "host:٣"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("a.example:7700") == ("a.example", 7700)
    assert split_address("[::1]:80") == ("::1", 80)
