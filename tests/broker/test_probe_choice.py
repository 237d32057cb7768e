"""Whom a newcomer is probed with."""

from __future__ import annotations

import random

import pytest

from fusionai.broker.probe_choice import AT_MOST, FIRST, first_partners, network_of, next_partner


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.168.1.7", "192.168.1.0/24"),
        ("2001:db8:1:2ff::5", "2001:db8:1:200::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("", ""),
        ("somewhere", ""),
    ],
)
def test_networks(host: str, network: str) -> None:
    assert network_of(host) == network


def test_a_few_near_one_wide_and_the_rest_anywhere() -> None:
    candidates = {f"p{each}": "home" if each < 20 else f"net{each}" for each in range(100)}
    widths = {f"p{each}": float(each) for each in range(20, 100)}
    for seed in range(20):
        chosen = first_partners("home", candidates, widths, random.Random(seed))
        assert len(chosen) == len(set(chosen)) == FIRST < AT_MOST
        assert all(candidates[each] == "home" for each in chosen[:2])
        assert int(chosen[2][1:]) >= 80, "of the widest quarter"
    assert first_partners("", candidates, {}, random.Random(0), most=3) != []
    assert first_partners("home", {}, {}, random.Random(0)) == []
    assert len(first_partners("home", {"a": "home", "b": "x"}, {"b": 1.0, "gone": 9.0}, random.Random(0))) == 2


def test_wide_partners_take_turns() -> None:
    candidates = {f"p{each}": "" for each in range(400)}
    widths = dict.fromkeys(candidates, 1e6)
    wide = [first_partners("", candidates, widths, random.Random(seed), most=1)[0] for seed in range(200)]
    assert max(map(wide.count, wide)) < 12


def test_walking_towards_the_near() -> None:
    """Machines on a line, a ms apart, each probed with the next ones: from 50 ms away the walk ends at the goal."""
    around = {each: {each + by: abs(by) / 1e3 for by in (-8, -3, -1, 1, 3, 8)} for each in range(-100, 100)}
    goal, found = 7, {"57": 0.05}
    neighbours = {str(each): {str(other): rtt_s for other, rtt_s in near.items()} for each, near in around.items()}
    everyone = set(neighbours)
    for _ in range(120):
        near = next_partner(found, neighbours.__getitem__, everyone - set(found))
        assert near is not None
        found[near] = abs(int(near) - goal) / 1e3
    assert min(found.values()) <= 1e-3
    assert next_partner({"a": 1.0}, lambda peer: {}, {"b"}) is None
