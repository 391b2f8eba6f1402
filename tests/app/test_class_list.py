"""Classes are made with colours and shortcuts of their own."""

from __future__ import annotations

from simdetr.app.class_list import COLOURS
from simdetr.app.database import writing
from simdetr.app.tables import Box, BoxSource, BoxStatus


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


def test_proposals_below_a_score_are_not_counted_in_classes_and_images(person):
    class_id, image = person.make_class(), person.images()[0]["id"]
    person.draw(image, (class_id, [0, 0, 9, 9]), inspected=False)
    found = [(0.9, BoxSource.DETECTOR), (0.2, BoxSource.DETECTOR), (None, BoxSource.IMPORT), (0.01, BoxSource.MINED)]
    with writing(person.desk.engine) as session:
        for score, source in found:
            kind = {"status": BoxStatus.PROPOSED, "source": source, "score": score}
            session.add(Box(image_id=image, class_id=class_id, x0=20, y0=0, x1=29, y1=9, **kind))
    for least, proposed in ((0.0, 4), (0.2, 4), (0.5, 3), (1.0, 2)):
        assert person.get("/projects/1/classes", min_score=least)["classes"][0]["boxes"] == proposed + 1
        for path in ("/projects/1/queue", "/projects/1/images"):
            rows = person.get(path, min_score=least)["images"]
            counts = next(row["counts"] for row in rows if row["id"] == image)
            assert (counts["proposed"], counts["manual"]) == (proposed, 1)
