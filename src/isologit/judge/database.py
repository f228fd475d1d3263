"""What a judge remembers: rounds, entries, runs and verdicts, in one SQLite file. Every run ends in a final state.

Owns the tables and their states. Evidence lies in files; the database says only where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, ForeignKey, String, UniqueConstraint, create_engine, event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from isologit.errors import UserError

DATABASE_FILE = "judge.sqlite"
RunState = Literal["queued", "running", "done", "voided", "abandoned"]
FINAL: frozenset[str] = frozenset({"done", "voided", "abandoned"})
JUDGED: frozenset[str] = frozenset({"done", "voided"})
"""done: its evidence is kept and judged. voided: the machine drifted, and the run was repeated: its time does not
count, but its evidence is judged as well, so that no drift hides what an entry did. abandoned: the judge ended
meanwhile, and the run was repeated; never the entry's fault."""


class DatabaseError(UserError):
    """The judge's folder or database cannot be used."""


class Base(DeclarativeBase):
    """All tables."""


class EntryRow(Base):
    """An entry as it was handed in: frozen files under `entries/SHA256`."""

    __tablename__ = "entries"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80))
    team: Mapped[str] = mapped_column(String(80))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    techniques: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[str] = mapped_column(String(32))


class RoundRow(Base):
    """One judgement of some entries under one profile. seed: in the clear only when `state` is finished."""

    __tablename__ = "rounds"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    profile: Mapped[dict[str, Any]] = mapped_column(JSON)
    model: Mapped[str] = mapped_column(String(400))
    seed_sha256: Mapped[str] = mapped_column(String(64))
    seed: Mapped[str] = mapped_column(String(64))
    anchor_id: Mapped[int] = mapped_column(ForeignKey("entries.id"))
    practice: Mapped[bool]
    environment: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16))  # running | finished
    created_at: Mapped[str] = mapped_column(String(32))
    finished_at: Mapped[str | None] = mapped_column(String(32))

    anchor: Mapped[EntryRow] = relationship()
    runs: Mapped[list[RunRow]] = relationship(back_populates="round", order_by="RunRow.place")
    verdicts: Mapped[list[VerdictRow]] = relationship(back_populates="round")


class RunRow(Base):
    """One run: what it is, its place in the order, and what became of it."""

    __tablename__ = "runs"
    __table_args__ = (UniqueConstraint("round_id", "entry_id", "kind", "repeat", "attempt"),)

    id: Mapped[str] = mapped_column(String(80), primary_key=True)
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.id"))
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id"))
    kind: Mapped[str] = mapped_column(String(16))
    repeat: Mapped[int]
    attempt: Mapped[int]
    place: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))
    note: Mapped[str] = mapped_column(String(400), default="")
    duration_s: Mapped[float | None]

    round: Mapped[RoundRow] = relationship(back_populates="runs")
    entry: Mapped[EntryRow] = relationship()


class VerdictRow(Base):
    """What was found about an entry in a round; judged again, it is replaced and the older one kept with its date."""

    __tablename__ = "verdicts"

    id: Mapped[int] = mapped_column(primary_key=True)
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.id"))
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id"))
    status: Mapped[str] = mapped_column(String(16))
    findings: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    audits: Mapped[dict[str, str]] = mapped_column(JSON)  # name -> passed | failed | not applicable: why
    figures: Mapped[dict[str, Any]] = mapped_column(JSON)
    panel: Mapped[dict[str, int]] = mapped_column(JSON)
    judged_at: Mapped[str] = mapped_column(String(32))
    current: Mapped[bool]

    round: Mapped[RoundRow] = relationship(back_populates="verdicts")
    entry: Mapped[EntryRow] = relationship()


class Database:
    """The file, brought to the newest schema when it is opened. Raises DatabaseError when that cannot be done."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        file = folder / DATABASE_FILE
        if not create and not file.is_file():
            raise DatabaseError(f"{folder}: no {DATABASE_FILE} in it; a judge's folder is made by: isologit judge run")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"{folder}: cannot be made a folder ({error.strerror}); choose another") from None
        self.folder = folder
        self._engine = _engine(file)
        try:
            _migrate(file)
        except Exception as error:
            said = error.orig if isinstance(error, DBAPIError) else error
            raise DatabaseError(f"{file}: cannot be opened ({' '.join(str(said).split())[:200]})") from error
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: committed at the end, rolled back when an exception leaves it. Raises DatabaseError."""
        try:
            with self._sessions.begin() as session:
                yield session
        except OperationalError as error:
            said = " ".join(str(error.orig).split())
            raise DatabaseError(f"{self.folder / DATABASE_FILE}: {said}; nothing was lost: run it again") from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def now() -> str:
    """The time in UTC, as it is stored."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _engine(file: Path) -> Engine:
    engine = create_engine(f"sqlite:///{file}")

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, record: Any) -> None:
        # NOTE: a killed judge must find what it had committed; readers (board, web) never block it.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA busy_timeout=10000")

    return engine


def _migrate(file: Path) -> None:
    with as_file(files("isologit.judge").joinpath("migrations")) as scripts:
        config = Config()
        config.set_main_option("script_location", str(scripts))
        config.set_main_option("sqlalchemy.url", f"sqlite:///{file}")
        command.upgrade(config, "head")
