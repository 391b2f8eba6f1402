"""An address of a database in, one that is ready out: opened, made or brought up to date by its migrations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Dialect, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlmodel import Session

MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_S = 10
_CACHE_KIB = 16_384
_turns: WeakKeyDictionary[Dialect, threading.Lock] = WeakKeyDictionary()


def open_database(url: str) -> Engine:
    """Open a database and apply the migrations that it lacks.

    SQLite works in its WAL mode, in which readers do not wait for a writer, with foreign keys, and waits ten seconds
    for another writer.

    Raises:
        ValueError: The address cannot be read, names a database that is not known or not installed, or one that was
            made by a later version of simdetr.
        OSError: There is no database that answers.
    """
    try:
        address = make_url(url)
        engine = create_engine(address, **_options(address.get_backend_name()))
    except (ArgumentError, NoSuchModuleError) as error:
        raise ValueError(f"database: {error}; expected a URL such as postgresql+psycopg://me@host/labels") from error
    except ImportError as error:
        raise ValueError(f"database: {error}; install it with `pip install 'simdetr[app-postgres]'`") from error
    if address.get_backend_name() == "sqlite":
        if address.database:
            Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        migrate(engine)
    except OperationalError as error:
        raise OSError(
            f"database: {address.render_as_string(hide_password=True)} does not answer: {error.orig}"
        ) from error
    return engine


def _options(backend: str) -> dict[str, Any]:
    if backend == "sqlite":
        return {"connect_args": {"timeout": _BUSY_S, "check_same_thread": False}}
    return {"pool_pre_ping": True}


def _prepare_sqlite(connection: Any, record: object) -> None:  # noqa: ANN401
    connection.isolation_level = None  # SQLAlchemy's begin, below, is the only one
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", f"cache_size = -{_CACHE_KIB}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_S * 1000}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:  # noqa: ANN401
    writes = connection.get_execution_options().get("simdetr_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def configuration() -> Config:
    """Alembic's, with the package's own migrations."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def migrate(engine: Engine) -> None:
    """Apply what is missing; a ValueError where the database is newer than this simdetr."""
    config = configuration()
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.connect() as connection:
        there = MigrationContext.configure(connection).get_current_revision()
    if there is not None and there not in known:
        raise ValueError(
            f"database: it was made by a later simdetr (step {there}); update simdetr, or choose another --out"
        )
    with engine.execution_options(simdetr_writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A session that only looks."""
    with Session(engine) as session:
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A session whose changes are kept together or not at all; on SQLite it is the only writer while it is open.

    Threads of this process wait at a lock: SQLite's own waiting sleeps, up to a tenth of a second at a time.
    """
    alone = _turns.setdefault(engine.dialect, threading.Lock()) if engine.dialect.name == "sqlite" else nullcontext()
    with alone, Session(engine.execution_options(simdetr_writes=True), expire_on_commit=False) as session:
        with session.begin():
            yield session
