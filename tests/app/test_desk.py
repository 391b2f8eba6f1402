"""What requests share: who asks, and which folders are read in."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from simdetr.app.desk import ANONYMOUS, author_of


@pytest.mark.parametrize(
    ("header", "author"),
    [(None, ANONYMOUS), (quote("김 민수"), "김 민수"), ("a%0Ab", "ab"), ("   ", ANONYMOUS), ("x" * 500, "x" * 100)],
)
def test_who_asks_is_a_line_of_text(header, author):
    assert author_of(header) == author


def test_images_that_came_later_are_found_at_the_next_start(serve, own_scenes):
    person = serve()
    first = next((own_scenes / "images").iterdir())
    class_id = person.make_class()
    person.draw(1, (class_id, [0, 0, 9, 9]))
    (own_scenes / "images" / "later.jpg").write_bytes(first.read_bytes())
    person = serve()
    assert person.get("/projects/1")["images"] == 7 and person.get("/projects/1")["boxes"] == 1


def test_a_list_of_images_is_as_good_as_a_folder(serve, own_scenes, tmp_path):
    paths = sorted((own_scenes / "images").iterdir())[:2]
    listed = tmp_path / "some.txt"
    listed.write_text("".join(f"{path}\n" for path in paths))
    person = serve(images=listed)
    assert len(person.images()) == 2
    assert person.client.get(f"/api/images/{person.images()[0]['id']}/file").content == paths[0].read_bytes()
