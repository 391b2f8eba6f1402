"""Times keep their zone, and every table that counts has an id that is not used again."""

from __future__ import annotations

from datetime import UTC

from sqlmodel import select

from simdetr.app.database import open_database, reading, writing
from simdetr.app.tables import Project, Table, now


def test_times_are_in_utc_also_where_the_database_forgets_it(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path / 'labels.sqlite'}")
    before = now()
    with writing(engine) as session:
        session.add(Project(name="p", folder="/a"))
    with reading(engine) as session:
        created = session.scalars(select(Project)).one().created
    assert created.tzinfo is UTC and before <= created <= now()
    engine.dispose()


def test_ids_that_people_and_logs_remember_are_not_used_again():
    for name in ("project", "image", "class", "box", "run", "event"):
        assert Table.metadata.tables[name].dialect_options["sqlite"]["autoincrement"] is True
