"""A hundred thousand images: added without being opened, paged without being sorted."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text
from sqlmodel import select

from simdetr.app.database import open_database, reading, writing
from simdetr.app.image_list import add_paths, counts_by_status, page, paths_below, queue, set_priorities
from simdetr.app.refusals import FieldRefusal
from simdetr.app.tables import Image, ImageStatus, Project


@pytest.fixture
def engine(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path / 'labels.sqlite'}")
    with writing(engine) as session:
        session.add(Project(name="p", folder=str(tmp_path)))
    yield engine
    engine.dispose()


def test_many_images_are_added_paged_and_queued_by_indices(engine, tmp_path):
    count = 100_000
    read = []

    def names():
        for number in range(count):
            read.append(number)
            yield f"{number:06d}.jpg"

    assert add_paths(engine, 1, tmp_path, names()) == count
    assert add_paths(engine, 1, tmp_path, ["000001.jpg"]) == 1
    statements = []
    event.listen(engine, "before_cursor_execute", lambda c, cu, statement, p, *_: statements.append((statement, p)))
    with reading(engine) as session:
        assert counts_by_status(session, 1)[ImageStatus.NEW] == count
        first, after = page(session, 1, limit=50)
        second, _ = page(session, 1, limit=50, after=after, statuses=[ImageStatus.NEW])
        assert [image.id for image in first + second] == list(range(1, 101))
        assert [image.id for image in queue(session, 1, 3)] == [1, 2, 3]
        named, after = page(session, 1, limit=2, by_name=True)
        assert ([image.path for image in named], after) == (["000000.jpg", "000001.jpg"], "000001.jpg")
        for statement, values in [row for row in statements if "LIMIT" in row[0]]:
            plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
            steps = " ".join(row[3] for row in plan)
            assert "USING INDEX" in steps and "TEMP B-TREE" not in steps, steps


def test_priorities_put_images_first_and_an_audit_s_stay(engine, tmp_path):
    add_paths(engine, 1, tmp_path, [f"{number}.jpg" for number in range(4)])
    with writing(engine) as session:
        session.connection().execute(text("UPDATE image SET audit = 1, place = -1e9 WHERE id = 4"))
        set_priorities(session, 1, [(3, 0.9, "unsure", "no_box"), (1, 0.1, "sure", ""), (4, 0.0, "other", "")])
    with reading(engine) as session:
        assert [image.id for image in queue(session, 1, 4)] == [4, 3, 1, 2]
        assert session.scalars(select(Image).where(Image.id == 3)).one().reason == "unsure"


@pytest.mark.parametrize("after", ["", "x", "1:x", "1:2:3", "1:" + "9" * 30])
def test_what_is_no_place_in_a_list_is_refused(engine, after):
    with reading(engine) as session, pytest.raises(FieldRefusal):
        page(session, 1, after=after)


def test_links_that_lead_out_of_a_folder_are_left_out_and_said(tmp_path, caplog):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "a.png", inside / "sub" / "b.JPG", outside / "c.png", inside / "notes.txt"):
        path.write_bytes(b"x")
    (inside / "link.png").symlink_to(outside / "c.png")
    (inside / "folder").symlink_to(outside)
    (inside / "same.png").symlink_to(inside / "a.png")
    assert sorted(paths_below(inside)) == ["a.png", "same.png", "sub/b.JPG"]
    assert "2 images are left out" in caplog.text
