"""What survives a restart of the broker. SQLite now; PostgreSQL may follow behind the same `Store`."""

from __future__ import annotations

import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fusionai.broker.records import JobRecord, LinkRecord, MemberRecord
from fusionai.broker.store_upgrades import upgraded_job
from fusionai.errors import StorageError

SCHEMA_VERSION = 2

_FIRST_SCHEMA = "1"
"""Its jobs have plans of one pipeline; they are upgraded when the database is opened."""

Record = MemberRecord | JobRecord | LinkRecord
_Record = TypeVar("_Record", MemberRecord, JobRecord, LinkRecord)

MOST_JOBS = 1000
"""Newest jobs that a restarted broker remembers; older ones stay in the database."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE members (peer TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, record TEXT NOT NULL);
CREATE TABLE jobs (job TEXT PRIMARY KEY, state TEXT NOT NULL, submitted_s REAL NOT NULL, record TEXT NOT NULL);
CREATE INDEX jobs_by_time ON jobs (submitted_s);
CREATE TABLE links (source TEXT NOT NULL, target TEXT NOT NULL, record TEXT NOT NULL,
                    PRIMARY KEY (source, target));
"""
"""Keys and what is searched by are columns; the rest is JSON, so that records may gain fields."""


class Store(ABC):
    """Keeps records. Methods block and are called from one thread at a time; all raise StorageError."""

    @abstractmethod
    def members(self) -> list[MemberRecord]:
        """Return every member known."""

    @abstractmethod
    def jobs(self) -> list[JobRecord]:
        """Return the newest jobs, oldest first."""

    @abstractmethod
    def links(self) -> list[LinkRecord]:
        """Return every measured pair."""

    @abstractmethod
    def save(self, records: Sequence[Record]) -> None:
        """Insert or replace records, all or none."""

    @abstractmethod
    def forget(self, peers: Sequence[str]) -> None:
        """Delete members and their links."""

    @abstractmethod
    def get(self, name: str) -> str | None:
        """Return a setting."""

    @abstractmethod
    def put(self, name: str, value: str) -> None:
        """Keep a setting."""

    @abstractmethod
    def close(self) -> None:
        """Release the database."""


class SqliteStore(Store):
    """A store in one SQLite file."""

    def __init__(self, path: Path) -> None:
        """Open the database, making it when absent.

        Raises:
            StorageError: it is corrupt, in use by another broker, of a later version, or cannot be written.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=0.5, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"the broker's database {path} cannot be opened: {error}; check the folder's rights and space, or "
                "give another --state-dir"
            ) from error
        try:
            self._open()
        except sqlite3.Error as error:
            self._database.close()
            raise _refusal(path, error) from error
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        # The lock is held until closing, so a second broker on the same folder is noticed at once.
        self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute("BEGIN IMMEDIATE")
        try:
            found = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(str(found))
            self._check_schema()
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _check_schema(self) -> None:
        tables = {row[0] for row in self._database.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if not tables:
            for statement in _SCHEMA.split(";"):
                self._database.execute(statement)
            self._database.execute("INSERT INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))
            return
        if not tables >= {"meta", "members", "jobs", "links"}:
            raise StorageError(f"{self.path} is not a broker's database; give another --state-dir")
        found = self.get("schema")
        if found == _FIRST_SCHEMA:
            self._upgrade()
        elif found != str(SCHEMA_VERSION):
            raise StorageError(
                f"the broker's database {self.path} has schema {found}, this version knows {SCHEMA_VERSION}: "
                "update fusionai, or give another --state-dir"
            )

    def _upgrade(self) -> None:
        """Bring a database of schema 1 up to date, in the transaction that opens it."""
        rows = self._database.execute("SELECT job, record FROM jobs").fetchall()
        for job, text in rows:
            self._database.execute("UPDATE jobs SET record = ? WHERE job = ?", (upgraded_job(text), job))
        self._database.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (str(SCHEMA_VERSION),))

    def members(self) -> list[MemberRecord]:
        return self._records("SELECT record FROM members", MemberRecord)

    def jobs(self) -> list[JobRecord]:
        newest = f"SELECT record FROM jobs ORDER BY submitted_s DESC LIMIT {MOST_JOBS}"
        return self._records(newest, JobRecord)[::-1]

    def links(self) -> list[LinkRecord]:
        return self._records("SELECT record FROM links", LinkRecord)

    def save(self, records: Sequence[Record]) -> None:
        statements: list[tuple[str, tuple[Any, ...]]] = []
        for record in records:
            text = msgspec.json.encode(record).decode()
            match record:
                case MemberRecord():
                    row: tuple[Any, ...] = (record.peer, record.name, record.state, text)
                    statements.append(("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", row))
                case JobRecord():
                    row = (record.job, record.state, record.submitted_s, text)
                    statements.append(("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?)", row))
                case LinkRecord():
                    row = (record.source, record.target, text)
                    statements.append(("INSERT OR REPLACE INTO links VALUES (?, ?, ?)", row))
        self._write(statements)

    def forget(self, peers: Sequence[str]) -> None:
        self._write(
            [("DELETE FROM members WHERE peer = ?", (peer,)) for peer in peers]
            + [("DELETE FROM links WHERE source = ? OR target = ?", (peer, peer)) for peer in peers]
        )

    def get(self, name: str) -> str | None:
        try:
            row = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error as error:
            raise _refusal(self.path, error) from error
        return None if row is None else str(row[0])

    def put(self, name: str, value: str) -> None:
        self._write([("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))])

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _records(self, query: str, kind: type[_Record]) -> list[_Record]:
        try:
            with self._lock:
                rows = self._database.execute(query).fetchall()
            return [msgspec.json.decode(row[0], type=kind) for row in rows]
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise _refusal(self.path, error) from error

    def _write(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        try:
            with self._lock:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    for statement, values in statements:
                        self._database.execute(statement, values)
                    self._database.execute("COMMIT")
                except BaseException:
                    if self._database.in_transaction:
                        self._database.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise _refusal(self.path, error) from error


def _refusal(path: Path, error: Exception) -> StorageError:
    text = str(error)
    if isinstance(error, sqlite3.OperationalError):
        if "locked" in text or "busy" in text:
            return StorageError(
                f"the broker's database {path} is in use by another broker: stop that, or give another --state-dir"
            )
        if "full" in text or "disk I/O" in text or "readonly" in text or "unable to open" in text:
            return StorageError(f"the broker's database {path} cannot be written: {text}; free or repair the disk")
    return StorageError(
        f"the broker's database {path} is corrupt ({text}): restore it from a backup, or move it away; members will "
        "register again by themselves, but the record of jobs is lost"
    )
