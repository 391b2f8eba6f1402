"""A new database, an older one, a later one; SQLite's settings; PostgreSQL where there is one."""

from __future__ import annotations

import os

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from simdetr.app.database import open_database, reading, writing
from simdetr.app.tables import Box, BoxClass, Cluster, Event, Image, Lease, Project, Run, Shot, Table, now


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path):
    url = f"sqlite:///{tmp_path / 'sub' / 'labels.sqlite'}"
    if request.param == "postgresql":
        url = os.environ.get("SIMDETR_POSTGRES", "")
        if not url:
            pytest.skip("no PostgreSQL: SIMDETR_POSTGRES is not set")
    engine = open_database(url)
    yield engine
    if request.param == "postgresql":
        with engine.begin() as connection:
            Table.metadata.drop_all(connection)
            connection.execute(text("DROP TABLE alembic_version"))
    engine.dispose()


def test_an_empty_database_that_is_migrated_has_the_tables_of_the_metadata(engine):
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    there = inspect(engine)
    for table in Table.metadata.sorted_tables:
        assert {index["name"] for index in there.get_indexes(table.name)} >= {index.name for index in table.indexes}


def test_what_is_written_together_is_kept_together_or_not_at_all(engine):
    with pytest.raises(RuntimeError), writing(engine) as session:
        session.add(Project(name="lost", folder="/a"))
        session.flush()
        raise RuntimeError
    with writing(engine) as session:
        session.add(Project(name="kept", folder="/a"))
    with reading(engine) as session:
        assert [row.name for row in session.scalars(select(Project))] == ["kept"]


def test_rows_of_what_is_not_there_are_refused_and_go_with_what_they_belong_to(engine):
    with pytest.raises(IntegrityError), writing(engine) as session:
        session.add(Image(project_id=7, path="a.png"))
    with writing(engine) as session:
        project = Project(name="p", folder="/a")
        session.add(project)
        session.flush()
        session.add(Image(project_id=project.id, path="a.png"))
    with writing(engine) as session:
        session.delete(session.scalar(select(Project).where(col(Project.name) == "p")))
    with reading(engine) as session:
        assert session.scalar(select(Image)) is None


def test_a_project_goes_with_all_that_is_in_it(engine):
    with writing(engine) as session:
        project = Project(name="p", folder="/a")
        session.add(project)
        session.flush()
        image, own = Image(project_id=project.id, path="a.png"), BoxClass(project_id=project.id, name="c")
        session.add_all([image, own])
        session.flush()
        box = Box(image_id=image.id, class_id=own.id, x0=0, y0=0, x1=1, y1=1)
        session.add_all([box, Run(project_id=project.id, kind="train")])
        session.flush()
        session.add_all(
            [Shot(project_id=project.id, box_id=box.id), Lease(image_id=image.id, holder="me", until=now())]
        )
        session.add(Cluster(project_id=project.id, class_id=own.id, members=[1]))
        session.add(Event(project_id=project.id, image_id=image.id, kind="edit", what="save"))
    with writing(engine) as session:
        session.delete(session.scalars(select(Project)).one())
    with reading(engine) as session:
        for table in Table.metadata.sorted_tables:
            assert session.execute(select(table)).all() == [], table.name


def test_ids_are_never_used_again(engine):
    ids = []
    for name in ("first", "second"):
        with writing(engine) as session:
            project = Project(name=name, folder="/a")
            session.add(project)
            session.flush()
            ids.append(project.id)
            session.delete(project)
    assert ids[0] < ids[1]


def test_sqlite_lets_readers_in_while_somebody_writes(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path / 'labels.sqlite'}")
    with engine.connect() as connection:
        for pragma, value in {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 10_000}.items():
            assert connection.execute(text(f"PRAGMA {pragma}")).scalar() == value
    with writing(engine) as session:
        session.add(Project(name="new", folder="/a"))
        session.flush()
        with reading(engine) as other:
            assert other.scalar(select(Project)) is None
    engine.dispose()


def test_a_database_of_a_later_version_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.sqlite'}"
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ValueError, match="made by a later simdetr"):
        open_database(url)


@pytest.mark.parametrize("url", ["nonsense", "mybase://host/labels"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="database: "):
        open_database(url)
