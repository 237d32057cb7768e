"""The broker's store and the journal in front of it, on a real disk."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from msgspec.structs import replace

from fusionai.broker.journal import Journal
from fusionai.broker.records import JobRecord, LinkRecord, MemberRecord
from fusionai.broker.store import SqliteStore
from fusionai.errors import StorageError
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import JobId
from fusionai.scheduling.profile import LinkProfile


def member(peer: str, state: str = "idle") -> MemberRecord:
    return MemberRecord(
        peer=PeerId(peer * 64), name=peer, role="compnode", state=state, device=None,  # type: ignore[arg-type]
        addresses=("127.0.0.1:1",), lab=False, seen_s=12.5,
    )  # fmt: skip


def job(name: str, submitted_s: float = 1.0) -> JobRecord:
    return JobRecord(
        job=JobId(name), name=name, owner=PeerId("a" * 64), owner_name="a", state="running", submitted_s=submitted_s
    )


def test_records_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    link = LinkRecord(
        source=PeerId("a" * 64), target=PeerId("b" * 64), there=LinkProfile(0.01, 1e6), back=None, measured_s=3.0
    )
    store = SqliteStore(path)
    store.save([member("a"), member("b"), job("second", 2.0), job("first", 1.0), link])
    store.save([member("a", "left")])
    store.put("port", "7700")
    store.close()
    store = SqliteStore(path)
    assert sorted(store.members(), key=lambda each: each.name) == [member("a", "left"), member("b")]
    assert [each.name for each in store.jobs()] == ["first", "second"]
    assert store.links() == [link]
    assert store.get("port") == "7700"
    assert store.get("nothing") is None
    store.forget([PeerId("a" * 64)])
    assert store.members() == [member("b")]
    assert store.links() == []
    store.close()


def test_a_second_broker_on_the_folder_is_refused(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "broker.sqlite")
    with pytest.raises(StorageError, match="in use by another broker"):
        SqliteStore(tmp_path / "broker.sqlite")
    first.close()
    SqliteStore(tmp_path / "broker.sqlite").close()


def test_corrupt_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    path.write_bytes(b"this is no database, but long enough to look like one" * 100)
    with pytest.raises(StorageError, match="is corrupt"):
        SqliteStore(path)


def test_corruption_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    store = SqliteStore(path)
    store.save([member(letter) for letter in "abcdef"] + [job(f"job-{number}") for number in range(200)])
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(StorageError, match="is corrupt"):
        SqliteStore(path)


def test_foreign_and_later_databases_are_refused(tmp_path: Path) -> None:
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE songs (name TEXT)")
    foreign.commit()
    foreign.close()
    with pytest.raises(StorageError, match="not a broker's database"):
        SqliteStore(tmp_path / "foreign.sqlite")
    store = SqliteStore(tmp_path / "later.sqlite")
    store.put("schema", "99")
    store.close()
    with pytest.raises(StorageError, match="schema 99"):
        SqliteStore(tmp_path / "later.sqlite")


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be opened"):
        SqliteStore(tmp_path / "file" / "broker.sqlite")


def test_the_journal_writes_the_newest_version_and_keeps_what_failed(tmp_path: Path) -> None:
    class Full(SqliteStore):
        full = False

        def save(self, records: object) -> None:
            if self.full:
                raise StorageError("no space")
            super().save(records)  # type: ignore[arg-type]

    path = tmp_path / "broker.sqlite"

    async def main() -> None:
        store = Full(path)
        journal = Journal(lambda: store)
        await journal.open()
        for step in range(100):
            journal.keep(replace(job("j"), step=step))
        store.full = True
        with pytest.raises(StorageError):
            await journal.flush()
        journal.keep(member("a"))
        store.full = False
        await journal.flush()
        members, jobs, _ = await journal.load()
        assert [each.step for each in jobs] == [99]
        assert members == [member("a")]
        journal.drop(PeerId("a" * 64))
        await journal.close()

    asyncio.run(main())
    store = SqliteStore(path)
    assert store.members() == []
    store.close()


SCHEMA_1_JOB = """{"job":"abc","name":"n","owner":"oooo","owner_name":"","state":"running","reason":"","step":7,
"steps":9,"loss":null,"tokens_per_s":0.0,"compnodes":{"cccc":"c"},"config":"","plan":{"graph_hash":"00","sizes":{"b":1},
"microbatches":4,"privacy":"open","owner":"oooo","stages":[{"stage":0,"peer":"cccc","start":0,"stop":3,"in_flight":1,
"predicted":{"forward_s":1.0,"backward_s":1.0,"update_s":1.0,"memory_bytes":10,"send_s":0.0}}],"predicted_step_s":1.0,
"bottleneck":"stage 0","explanation":[]},"submitted_s":1.0,"generations":["abc.2","abc.3"],"prepared":3,
"preparing":{"generation":"abc.3","plan":{"graph_hash":"00","sizes":{"b":1},"microbatches":4,"privacy":"open",
"owner":"oooo","stages":[],"predicted_step_s":1.0,"bottleneck":"","explanation":[]},"compnodes":{}}}"""
"""A row that the version with schema 1 wrote, while a further plan was prepared."""


def test_a_database_of_schema_1_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    SqliteStore(path).close()
    old = sqlite3.connect(path)
    old.execute("INSERT INTO jobs VALUES ('abc', 'running', 1.0, ?)", (SCHEMA_1_JOB,))
    old.execute("UPDATE meta SET value = '1' WHERE name = 'schema'")
    old.commit()
    old.close()
    for _ in range(2):  # upgraded once, then read as it is
        store = SqliteStore(path)
        (record,) = store.jobs()
        assert store.get("schema") == "2"
        store.close()
        assert (record.job, record.step, record.prepared, record.preparing) == ("abc", 7, 3, None)
        assert record.plan is not None
        assert [(stage.peer, stage.stop) for stage in record.plan.stages] == [("cccc", 3)]
        assert record.plan.pipelines[0].microbatches == 4
