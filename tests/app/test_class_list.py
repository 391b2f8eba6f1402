"""Classes are made with colours and shortcuts of their own."""

from __future__ import annotations

from simdetr.app.class_list import COLOURS


def test_colours_go_round_and_shortcuts_end_at_nine(person):
    made = [person.ask("POST", "/projects/1/classes", {"name": f"class {n}"}, 201) for n in range(12)]
    assert [row["colour"] for row in made] == [COLOURS[n % len(COLOURS)] for n in range(12)]
    assert [row["shortcut"] for row in made] == [*"123456789", None, None, None]


def test_boxes_are_counted_without_rejected_ones_and_versions_before(person):
    class_id, image = person.make_class(), person.images()[0]["id"]
    box = person.draw(image, (class_id, [0, 0, 9, 9]), (class_id, [20, 0, 29, 9]))["boxes"][0]
    moved = [{"id": box["id"], "class_id": class_id, "xyxy": [1, 0, 9, 9]}]
    person.ask("PUT", f"/images/{image}/boxes", {"version": 1, "boxes": moved})
    assert person.get("/projects/1/classes")["classes"][0]["boxes"] == 1
