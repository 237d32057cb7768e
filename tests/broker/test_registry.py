"""Names, states and leases; bounds on what members say."""

from __future__ import annotations

import pytest
from broker_pool import profile
from msgspec.structs import replace

from fusionai.broker.link_book import LinkBook
from fusionai.broker.records import LinkRecord, MemberRecord
from fusionai.broker.registry import Registry
from fusionai.broker.validation import check_heartbeat, check_register
from fusionai.errors import AuthenticationError, ConfigError, ProtocolError
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import FIRST_EPOCH, JobId
from fusionai.pool.messages import Heartbeat, HeldShare, RegisterMember
from fusionai.scheduling.profile import LinkProfile

A, B, C = (PeerId(letter * 64) for letter in "abc")


def registry(most: int = 100) -> tuple[Registry, dict[PeerId, MemberRecord]]:
    kept: dict[PeerId, MemberRecord] = {}
    return Registry(
        lambda record: kept.update({record.peer: record}), lambda peer: kept.pop(peer, None), most=most
    ), kept


def register(name: str = "anna", role: str = "compnode") -> RegisterMember:
    return RegisterMember(name, role, profile(), ("127.0.0.1:1",))  # type: ignore[arg-type]


def test_names_are_unique_and_stay() -> None:
    book, _ = registry()
    assert book.register(A, register(), 1).name == "anna"
    assert book.register(B, register(), 1).name == "anna-2"
    assert book.register(B, register(), 2).name == "anna-2"
    book.depart(A, "lost", 3)
    assert book.register(B, register(), 4).name == "anna-2"
    assert book.register(C, register(), 4).name == "anna-3", "a lost member may come back to its name"
    book.register(A, register(), 5)
    book.depart(A, "left", 6)
    assert book.register(C, register("new"), 6).name == "new"
    assert book.register(C, register(), 7).name == "anna", "the name of one that left is free"


def test_states() -> None:
    book, kept = registry()
    book.register(A, register(), 1)
    book.lease(A, JobId("j"))
    assert book.status(1)[0].state == "working"
    assert book.idle() == []
    assert not book.release(A, JobId("other"))
    assert book.release(A, JobId("j"))
    assert [each.peer for each in book.idle()] == [A]
    book.depart(A, "left", 2)
    book.depart(A, "lost", 3)
    assert book.status(10)[0].state == "left", "a departure by own will stands"
    assert book.status(10)[0].last_seen_s == 8
    other, _ = registry()
    other.restore([replace(kept[A], state="working"), replace(kept[A], peer=B, name="b", state="left")])
    assert {each.name: each.state for each in other.status(3)} == {"anna": "unreachable", "b": "left"}


def test_observers_are_not_kept() -> None:
    book, kept = registry()
    book.register(A, register("looker", "observer"), 1)
    assert kept == {}
    assert book.status(1) == ()


def test_a_full_pool_makes_room_for_the_absent_longest_gone() -> None:
    book, kept = registry(most=2)
    book.register(A, register("a"), 1)
    book.register(B, register("b"), 2)
    with pytest.raises(AuthenticationError, match="full"):
        book.register(C, register("c"), 3)
    book.depart(B, "lost", 4)
    book.register(C, register("c"), 5)
    assert set(kept) == {A, C}


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 64, "a\n", "ä"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        check_register(register(name))


def test_bounds() -> None:
    with pytest.raises(ProtocolError, match="speed"):
        check_register(replace(register(), device=replace(profile(), memory_bytes_per_s=float("nan"))))
    with pytest.raises(ProtocolError, match="profile"):
        check_register(replace(register(), device=None))
    with pytest.raises(ProtocolError, match="addresses"):
        check_register(replace(register(), addresses=("127.0.0.1:1",) * 9))
    with pytest.raises(ProtocolError, match="jobs"):
        check_heartbeat(
            Heartbeat(0.5, 1, tuple(HeldShare(JobId(str(number)), FIRST_EPOCH, "") for number in range(100)), {})
        )
    with pytest.raises(ProtocolError, match="text"):
        check_heartbeat(Heartbeat(0.5, 1, (HeldShare(JobId("j"), FIRST_EPOCH, "x" * 5000),), {}))


def test_link_matrix_and_dialling() -> None:
    book = LinkBook(lambda record: None)
    members = [registry()[0].register(peer, register(), 1) for peer in (A, B, C)]
    quiet = replace(members[2], addresses=())
    assert [book.dials(one, other) for one, other in ((members[0], members[1]), (members[1], members[0]))] == [
        True,
        False,
    ]
    assert not book.dials(members[0], quiet)
    assert book.dials(quiet, members[0])
    there, back = LinkProfile(0.01, 1e6), LinkProfile(0.01, 2e6)
    book.measured(LinkRecord(source=B, target=A, there=there, back=back, measured_s=1))
    book.measured(LinkRecord(source=B, target=C, there=None, back=None, measured_s=1))
    assert book.dials(members[1], members[0]), "who dialled in the probe dials again"
    matrix = book.matrix([A, B, C])
    assert matrix[f"{B}>{A}"] == there
    assert matrix[f"{A}>{B}"] == back
    assert matrix[f"{C}>{B}"].bandwidth_bytes_per_s < 100
    assert not book.reachable(C, B)
    assert book.reachable(A, C)
    book.forget(B)
    assert book.matrix([A, B, C]) == {}
