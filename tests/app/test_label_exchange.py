"""Labels of other tools, in and out."""

from __future__ import annotations

import io
import json
import re
import zipfile

import pytest

from simdetr.data.label_files import FORMATS


def send(person, name, content, code=200, **query):
    answer = person.client.post("/api/projects/1/imports", files={"file": (name, content)}, params=query)
    assert answer.status_code == code, answer.text
    return answer.json()


@pytest.fixture
def coco(own_scenes):
    content = json.loads((own_scenes / "instances.json").read_text())
    for image in content["images"]:
        image["file_name"] = image["file_name"].removeprefix("images/")
    return content


def test_a_dry_run_only_reports(person, coco):
    found = send(person, "labels.json", json.dumps(coco), dry_run=True)
    assert (found["format"], found["images"], found["imported"]) == ("coco", 6, False)
    assert found["boxes"] == len(coco["annotations"]) and found["problems"] == []
    assert person.get("/projects/1/classes")["classes"] == []


def test_what_comes_in_goes_out_again(person, coco):
    assert send(person, "labels.json", json.dumps(coco))["imported"]
    assert person.get("/projects/1")["by_status"]["inspected"] == 6
    made = person.ask("POST", "/projects/1/exports", {"format": "coco"}, 201)
    out = json.loads(person.client.get(made["download"]).content)
    names = {row["id"]: row["file_name"] for row in coco["images"]}
    classes = {row["id"]: row["name"] for row in coco["categories"]}
    own_names = {row["id"]: row["file_name"] for row in out["images"]}
    own_classes = {row["id"]: row["name"] for row in out["categories"]}

    def rows(content, names, classes):
        return sorted(
            (names[row["image_id"]], classes[row["category_id"]], [round(value, 2) for value in row["bbox"]])
            for row in content["annotations"]
        )

    assert rows(out, own_names, own_classes) == rows(coco, names, classes)
    assert {row["simdetr"]["source"] for row in out["annotations"]} == {"import"}
    assert all("score" not in row for row in out["annotations"])
    again = send(person, "labels.json", json.dumps(coco))
    assert again["imported"] and person.get("/projects/1")["boxes"] == len(coco["annotations"])


def test_an_import_leaves_what_people_drew_and_can_be_undone(person, coco):
    image = person.images()[0]
    class_id = person.make_class("mine")
    person.draw(image["id"], (class_id, [0, 0, 5, 5]))
    send(person, "labels.json", json.dumps(coco), status="proposed")
    boxes = person.get(f"/images/{image['id']}/boxes")["boxes"]
    assert boxes[0]["status"] == "manual" and {box["status"] for box in boxes[1:]} <= {"proposed"}
    other = person.images()[1]
    sheet = person.get(f"/images/{other['id']}/boxes")
    assert sheet["boxes"] and sheet["image"]["status"] == "proposed"
    assert person.ask("POST", f"/images/{other['id']}/undo", {"version": sheet["version"]})["boxes"] == []


def test_proposals_have_the_scores_of_the_file_and_none_where_it_has_none(person, coco):
    def proposed():
        sheets = [person.get(f"/images/{image['id']}/boxes") for image in person.images()]
        return [box["score"] for sheet in sheets for box in sheet["boxes"]]

    send(person, "labels.json", json.dumps(coco), status="proposed")
    assert set(proposed()) == {None}
    for place, row in enumerate(coco["annotations"]):
        row["score"] = 1.0 if place else 0.25
    send(person, "labels.json", json.dumps(coco), status="proposed")
    assert sorted(proposed())[:2] == [0.25, 1.0]


def test_a_file_with_problems_changes_nothing_unless_it_is_asked_to(person, coco):
    coco["annotations"][0]["bbox"] = [0, 0, -5, 5]
    coco["annotations"][0].pop("area", None)
    coco["images"].append({"id": 99, "file_name": "stranger.png", "width": 9, "height": 9})
    found = send(person, "labels.json", json.dumps(coco))
    assert not found["imported"] and found["unknown_images"] == 1 and len(found["problems"]) == 2
    assert person.get("/projects/1")["boxes"] == 0
    assert send(person, "labels.json", json.dumps(coco), skip_bad=True)["imported"]
    assert person.get("/projects/1")["boxes"] == len(coco["annotations"]) - 1


@pytest.mark.parametrize(("name", "content"), [("a.json", b"{"), ("a.xyz", b"x"), ("a.zip", b"PK"), ("a.json", b"")])
def test_what_cannot_be_read_is_said_so_without_paths_of_this_machine(person, name, content):
    detail = send(person, name, content, 400)["detail"]
    assert str(person.settings.out) not in detail


def test_a_zip_cannot_write_elsewhere(person, coco):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../labels.json", json.dumps(coco))
    assert "leads out" in send(person, "labels.zip", stream.getvalue(), 400)["detail"]
    assert not list(person.settings.out.glob("**/labels.json"))


def test_images_go_with_the_labels_if_asked(person):
    class_id, image = person.make_class("점"), person.images()[0]
    person.draw(image["id"], (class_id, [0, 0, 5, 5]))
    made = person.ask("POST", "/projects/1/exports", {"images": True}, 201)
    with zipfile.ZipFile(io.BytesIO(person.client.get(made["download"]).content)) as archive:
        assert sorted(archive.namelist()) == [f"images/{image['name']}", "labels.json"]
        content = json.loads(archive.read("labels.json"))
    assert [row["name"] for row in content["categories"]] == ["점"] and len(content["images"]) == 1


@pytest.mark.parametrize("kind", [one.name for one in FORMATS])
def test_labels_go_out_in_every_format_and_come_back_the_same(serve, tmp_path, kind):
    person = serve()
    classes = {name: person.make_class(name) for name in ("חתול", "شجرة", "细胞", "고양이", "unused")}
    first, second, empty, opened, untouched = person.images()[:5]
    person.draw(first["id"], (classes["חתול"], [1.25, 2, 20, 30]), (classes["شجرة"], [5, 5, 40.5, 41]))
    person.draw(second["id"], (classes["细胞"], [0, 0, 9, 9]), (classes["고양이"], [10, 10, 30, 20]))
    person.draw(empty["id"])
    person.ask("POST", f"/images/{opened['id']}/open", {"holder": "a tab"})
    made = person.ask("POST", "/projects/1/exports", {"format": kind}, 201)
    assert (made["images"], made["boxes"]) == (3, 4)
    if kind in ("voc", "label-studio", "csv"):
        assert f"changed or lost: 1 × class without boxes, which {kind} does not hold" in made["notes"]
    answer = person.client.get(made["download"])
    name = re.findall('filename="(.*)"', answer.headers["content-disposition"])[0]
    assert name.endswith(".zip") == (kind in ("yolo", "voc"))

    def seen(who):
        names = {row["id"]: row["name"] for row in who.get("/projects/1/classes")["classes"]}
        return {
            image["name"]: (
                image["status"] == "inspected",
                [
                    (names[box["class_id"]], [round(value, 2) for value in box["xyxy"]], box["status"])
                    for box in who.get(f"/images/{image['id']}/boxes")["boxes"]
                ],
            )
            for image in who.images()
        }

    before = seen(person)
    other = serve(out=tmp_path / "other")
    found = send(other, name, answer.content)
    assert (found["format"], found["problems"], found["imported"]) == (kind, [], True)
    after = seen(other)
    assert after == before
    assert after[empty["name"]] == (True, [])
    assert not after[opened["name"]][0] and not after[untouched["name"]][0]


def test_what_nobody_saw_is_no_empty_image_where_proposals_go_out_too(person, coco):
    person.draw(person.images()[0]["id"])
    person.ask("POST", f"/images/{person.images()[1]['id']}/open", {"holder": "a tab"})
    made = person.ask("POST", "/projects/1/exports", {"statuses": ["proposed", "manual"]}, 201)
    out = json.loads(person.client.get(made["download"]).content)
    assert [row["file_name"] for row in out["images"]] == [person.images()[0]["name"]]


def test_regions_to_ignore_are_said_to_be_lost_where_a_format_has_none(person):
    class_id, image = person.make_class(), person.images()[0]
    person.draw(image["id"], (class_id, [0, 0, 9, 9]), (class_id, [20, 20, 30, 30]))
    sheet = person.get(f"/images/{image['id']}/boxes")
    boxes = [{"id": box["id"], "class_id": class_id, "xyxy": box["xyxy"]} for box in sheet["boxes"]]
    boxes[1]["ignore"] = True
    person.ask("PUT", f"/images/{image['id']}/boxes", {"version": sheet["version"], "boxes": boxes, "inspected": True})
    made = person.ask("POST", "/projects/1/exports", {"format": "yolo"}, 201)
    assert made["boxes"] == 1 and "changed or lost: 1 × crowd, which yolo does not know: left out" in made["notes"]


def test_nothing_inspected_is_nothing_to_write(person):
    person.ask("POST", "/projects/1/exports", {}, 409)
    person.ask("POST", "/projects/1/exports", {"format": "stone-tablet"}, 400)
    person.ask("GET", "/projects/1/exports/0123456789ab/download", status=404)


def test_labels_of_the_command_line_are_there_at_the_first_start_and_change_nothing_later(
    serve, own_scenes, coco, tmp_path
):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco))
    person = serve(labels=path)
    boxes = person.get("/projects/1")["boxes"]
    assert boxes == len(coco["annotations"])
    image = next(image for image in person.images() if image["counts"]["manual"])
    sheet = person.get(f"/images/{image['id']}/boxes")
    person.ask("PUT", f"/images/{image['id']}/boxes", {"version": sheet["version"], "boxes": [], "inspected": True})
    person = serve(labels=path)
    assert person.get("/projects/1")["boxes"] == boxes - len(sheet["boxes"])


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_a_box_that_is_there_twice_goes_out_and_comes_in_again(person, kind):
    class_id, image = person.make_class(), person.images()[0]
    person.draw(image["id"], (class_id, [4, 4, 20, 20]), (class_id, [4, 4, 20, 20]), (class_id, [30, 4, 40, 20]))
    made = person.ask("POST", "/projects/1/exports", {"format": kind}, 201)
    content = person.client.get(made["download"]).content
    person.draw(person.images()[1]["id"])
    found = send(person, "labels.json" if kind == "coco" else "labels.zip", content)
    assert found["imported"] and found["problems"] == []
    if kind == "coco":
        assert found["boxes"] == 2 and "1 × the same box of the same class again, dropped" in found["notes"][0]
