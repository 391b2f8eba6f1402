"""Projects, classes, and the machine over the interface."""

from __future__ import annotations

import pytest


def test_names_of_classes_are_trimmed_unique_and_of_any_script(person):
    made = person.ask("POST", "/projects/1/classes", {"name": "  고양이 "}, 201)
    assert (made["name"], made["shortcut"], made["kind"]) == ("고양이", "1", "novel")
    person.ask("POST", "/projects/1/classes", {"name": "고양이"}, 409)
    second = person.ask("POST", "/projects/1/classes", {"name": "개", "colour": "#abcdef"}, 201)
    assert (second["colour"], second["shortcut"]) == ("#abcdef", "2")
    person.ask("PATCH", f"/classes/{second['id']}", {"name": "고양이"}, 409)
    person.ask("PATCH", f"/classes/{second['id']}", {"shortcut": "1"}, 409)
    changed = person.ask("PATCH", f"/classes/{second['id']}", {"shortcut": None, "name": "강아지"})
    assert (changed["name"], changed["shortcut"], changed["colour"]) == ("강아지", None, "#abcdef")


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "x" * 201, None, 5])
def test_what_is_no_name_is_refused(person, name):
    assert person.ask("POST", "/projects/1/classes", {"name": name}, 422)["detail"][0]["loc"] == ["body", "name"]


def test_a_class_with_boxes_goes_only_with_word_on_what_becomes_of_them(person):
    one, two = person.make_class("one"), person.make_class("two")
    image = person.images()[0]["id"]
    person.draw(image, (one, [0, 0, 9, 9]))
    assert person.ask("DELETE", f"/classes/{one}", status=409)["boxes"] == 1
    person.ask("DELETE", f"/classes/{one}?target={one}", status=422)
    person.ask("DELETE", f"/classes/{one}?target={two}", status=204)
    sheet = person.get(f"/images/{image}/boxes")
    assert sheet["boxes"][0]["class_id"] == two and sheet["version"] == 2
    assert [row["id"] for row in person.get("/projects/1/classes")["classes"]] == [two]
    assert person.make_class("one") > two  # the id is not used again
    undone = person.ask("POST", f"/images/{image}/undo", {"version": 2})
    redone = person.ask("POST", f"/images/{image}/redo", {"version": undone["version"]})
    assert redone["boxes"][0]["class_id"] == two  # the log speaks of a class that has gone
    person.ask("DELETE", f"/classes/{two}?reject=true", status=204)
    assert person.get(f"/images/{image}/boxes")["boxes"] == []


def test_projects_are_made_of_folders_below_the_images_and_nothing_else(serve, own_scenes):
    (own_scenes / "images" / "part").mkdir()
    (own_scenes / "images" / "part" / "a.png").write_bytes(next((own_scenes / "images").glob("*.*")).read_bytes())
    person = serve()
    for folder in ("../", "/etc", "part/../..", "nothing"):
        answer = person.ask("POST", "/projects", {"name": "x", "folder": folder}, 422)
        assert answer["detail"][0]["loc"] == ["body", "folder"]
    made = person.ask("POST", "/projects", {"name": "x", "folder": "part"}, 201)
    person.desk.wait_for_index()
    assert person.get(f"/projects/{made['id']}")["images"] == 1
    person.ask("POST", "/projects", {"name": "x"}, 409)
    uploads = person.ask("POST", "/projects", {"name": "y"}, 201)
    assert uploads["images"] == 0
    assert person.ask("PATCH", f"/projects/{uploads['id']}", {"name": "z", "rejected_as": "background"})["name"] == "z"


def test_a_project_goes_with_its_labels_when_its_name_is_said(person, own_scenes):
    class_id = person.make_class()
    person.draw(1, (class_id, [0, 0, 9, 9]))
    name = person.get("/projects/1")["name"]
    person.ask("DELETE", "/projects/1?confirm=no", status=409)
    person.ask("DELETE", f"/projects/1?confirm={name}", status=204)
    person.ask("GET", "/projects/1", status=404)
    assert len(list((own_scenes / "images").iterdir())) == 6


def test_the_same_folder_is_the_same_project_after_a_restart(serve):
    serve().make_class("kept")
    person = serve()
    assert [project["images"] for project in person.get("/projects")["projects"]] == [6]
    assert [row["name"] for row in person.get("/projects/1/classes")["classes"]] == ["kept"]


def test_the_machine_is_told(person):
    found = person.get("/system")
    assert 0 < found["memory_used"] <= found["memory_total"] and found["cores"] >= 1 and found["disk_free"] > 0
    assert (found["database"], found["needs_token"]) == ("sqlite", False)
