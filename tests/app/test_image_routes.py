"""Images and boxes over the interface: queue, leases, saving, conflicts, undo, pictures, uploads."""

from __future__ import annotations

import io
import zipfile

import pytest
from PIL import Image

from simdetr.app.database import writing
from simdetr.app.image_list import take
from simdetr.app.tables import Lease, now


def picture(colour="red", size=(20, 10), kind="PNG", **options):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind, **options)
    return stream.getvalue()


def upload(person, *files):
    answer = person.client.post("/api/projects/1/images", files=[("files", file) for file in files])
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_images_of_the_folder_are_there_without_having_been_opened(person):
    images = person.images()
    assert len(images) == 6 and {image["status"] for image in images} == {"new"}
    assert {image["width"] for image in images} == {None}
    first = person.get("/projects/1/images", order="name", limit=4)
    second = person.get("/projects/1/images", order="name", limit=4, after=first["next"])
    assert [image["name"] for image in first["images"] + second["images"]] == [image["name"] for image in images]
    assert second["next"] is None


def test_pages_by_priority_are_complete_and_each_image_comes_once(person):
    found, after = [], None
    while True:
        page = person.get(
            "/projects/1/images", limit=2, status=["new", "skipped"], **({"after": after} if after else {})
        )
        found += [image["id"] for image in page["images"]]
        after = page["next"]
        if after is None:
            break
    assert sorted(found) == sorted(image["id"] for image in person.images()) and len(set(found)) == 6


def test_filters_are_of_one_and_the_same_box(person):
    one, two = person.make_class("one"), person.make_class("둘")
    first, second = person.images()[:2]
    person.draw(first["id"], (one, [0, 0, 9, 9]))
    person.draw(second["id"], (two, [0, 0, 9, 9]), inspected=False)

    def names(**query):
        return [image["id"] for image in person.get("/projects/1/images", order="name", **query)["images"]]

    assert names(class_id=two) == [second["id"]]
    assert names(status="inspected") == [first["id"]]
    assert names(source="user", box_status="manual") == [first["id"], second["id"]]
    assert names(class_id=one, source="detector") == []
    assert names(search=first["name"][-8:].upper()) == [first["id"]]
    assert names(search="%") == []


def test_two_people_never_get_the_same_image_and_a_lease_ends(person):
    got = [person.ask("POST", "/projects/1/next", {"holder": f"tab {n % 2}"})["image"]["id"] for n in range(2)]
    assert len(set(got)) == 2
    again = person.ask("POST", "/projects/1/next", {"holder": "tab 0"})
    assert again["image"]["id"] == got[0]  # still open in this tab
    person.ask("POST", f"/images/{got[0]}/open", {"holder": "tab 1"}, 409)
    with writing(person.desk.engine) as session:
        session.get(Lease, got[0]).until = now()
    assert person.ask("POST", f"/images/{got[0]}/open", {"holder": "tab 1"})["lease"]["holder"] == "tab 1"
    person.ask("POST", f"/images/{got[0]}/release", {"holder": "tab 1"}, 204)
    with writing(person.desk.engine) as session:
        assert take(session, got[0], "another")


def test_the_queue_ends_when_all_is_seen(person):
    seen, after = [], None
    while True:
        sheet = person.ask("POST", "/projects/1/next", {"holder": "me"} | ({"after": after} if after else {}))
        if sheet is None:
            break
        after = sheet["image"]["id"]
        seen.append(after)
        body = {"status": "skipped" if len(seen) == 2 else "inspected", "version": sheet["version"]}
        person.ask("PUT", f"/images/{after}/status", body)
    assert sorted(seen) == sorted(image["id"] for image in person.images())
    assert person.get("/projects/1/queue") == {"images": [], "left": 0, "order": None}
    assert person.get("/projects/1")["by_status"]["inspected"] == 5


def test_a_stale_write_changes_nothing_and_gets_the_state_that_is(person):
    class_id, image = person.make_class(), person.images()[0]
    person.draw(image["id"], (class_id, [1, 2, 30, 40]))
    body = {"version": 0, "boxes": []}
    answer = person.ask("PUT", f"/images/{image['id']}/boxes", body, 409)
    assert answer["current"]["version"] == 1 and len(answer["current"]["boxes"]) == 1
    assert person.get(f"/images/{image['id']}/boxes")["boxes"][0]["xyxy"] == [1, 2, 30, 40]


def test_saving_corrects_keeps_the_version_before_and_undo_survives_a_reload(serve):
    person = serve()
    class_id, image = person.make_class(), person.images()[0]["id"]
    box = person.draw(image, (class_id, [1, 2, 30.25, 40]))["boxes"][0]
    assert (box["status"], box["author"]) == ("manual", "ann")
    moved = {"id": box["id"], "class_id": class_id, "xyxy": [2, 2, 30.25, 40]}
    sheet = person.ask("PUT", f"/images/{image}/boxes", {"version": 1, "boxes": [moved]})
    after = sheet["boxes"][0]
    assert (after["id"], after["status"], after["xyxy"][0]) == (box["id"], "corrected", 2)
    versions = person.get(f"/boxes/{box['id']}/versions")["boxes"]
    assert [one["xyxy"][0] for one in versions] == [2, 1] and versions[1]["status"] == "manual"

    person = serve()  # a restart
    for wanted in ([1], []):
        sheet = person.ask("POST", f"/images/{image}/undo", {"version": sheet["version"]})
        assert [one["xyxy"][0] for one in sheet["boxes"]] == wanted
    assert not sheet["can_undo"] and sheet["image"]["status"] == "new"
    person.ask("POST", f"/images/{image}/undo", {"version": sheet["version"]}, 409)
    for wanted in (1, 2):
        sheet = person.ask("POST", f"/images/{image}/redo", {"version": sheet["version"]})
        assert [one["xyxy"][0] for one in sheet["boxes"]] == [wanted]
    assert not sheet["can_redo"] and sheet["image"]["status"] == "inspected"
    events = person.get(f"/images/{image}/history")["events"]
    assert [event["kind"] for event in events] == ["redo", "redo", "undo", "undo", "edit", "edit"]


def test_bad_boxes_are_named_by_their_place(person):
    class_id, image = person.make_class(), person.images()[0]["id"]
    good = {"class_id": class_id, "xyxy": [0, 0, 5, 5]}
    for bad, place in (
        (good | {"xyxy": [5, 0, 5, 5]}, ["body", "boxes", 1, "xyxy"]),
        (good | {"xyxy": [0, 0, 500, 5]}, ["body", "boxes", 1, "xyxy"]),
        (good | {"class_id": 99}, ["body", "boxes", 1, "class_id"]),
        (good | {"id": 99}, ["body", "boxes", 1, "id"]),
        (good | {"xyxy": [0, 0, 5]}, ["body", "boxes", 1, "xyxy"]),
        (good | {"score": 0.5}, ["body", "boxes", 1, "score"]),
    ):
        answer = person.ask("PUT", f"/images/{image}/boxes", {"version": 0, "boxes": [good, bad]}, 422)
        assert answer["detail"][0]["loc"] == place
    assert person.get(f"/images/{image}/boxes")["version"] == 0


def test_an_image_with_nothing_on_it_is_inspected_and_comes_back(person):
    image = person.images()[0]["id"]
    sheet = person.draw(image)
    assert sheet["image"]["status"] == "inspected" and sheet["boxes"] == []
    sheet = person.ask("POST", f"/images/{image}/undo", {"version": sheet["version"]})
    assert sheet["image"]["status"] == "new"


def test_pictures_are_those_that_browsers_show(person):
    camera = Image.Exif()
    camera[0x0112] = 6
    found = upload(
        person,
        ("deep.tif", picture(kind="TIFF")),
        ("turned.jpg", picture(size=(20, 10), kind="JPEG", exif=camera)),
    )
    deep, turned = found["added"]
    assert (turned["width"], turned["height"]) == (10, 20)
    answer = person.client.get(f"/api/images/{deep['id']}/file")
    assert answer.headers["content-type"] == "image/png" and Image.open(io.BytesIO(answer.content)).size == (20, 10)
    small = person.client.get(f"/api/images/{turned['id']}/thumbnail?size=64")
    assert small.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(small.content)).size == (10, 20)
    assert person.client.get(f"/api/images/{deep['id']}/file?original=true").content == picture(kind="TIFF")
    assert (
        "attachment" in person.client.get(f"/api/images/{deep['id']}/file?original=true").headers["content-disposition"]
    )


def test_what_is_uploaded_is_checked_and_not_kept_twice(person, own_scenes):
    first = person.images()[0]
    same = (own_scenes / "images" / first["name"]).read_bytes()
    found = upload(
        person,
        ("고양이.png", picture("blue")),
        ("again.png", picture("blue")),
        ("of the folder.jpg", same),
        ("script.png", b"<svg onload=alert(1)>"),
        ("empty.png", b""),
        ("../../evil.png", picture("green")),
    )
    assert [image["name"] for image in found["added"]] == ["uploads/고양이.png", "uploads/evil.png"]
    assert [(one["name"], one["image_id"]) for one in found["duplicates"]] == [
        ("again.png", found["added"][0]["id"]),
        ("of the folder.jpg", first["id"]),
    ]
    assert [one["name"] for one in found["refused"]] == ["script.png", "empty.png"]
    image = found["added"][0]["id"]
    kept = person.settings.out / "projects" / "1" / "uploads" / "고양이.png"
    assert kept.read_bytes() == picture("blue")
    person.ask("DELETE", f"/images/{image}", status=204)
    assert not kept.exists()
    person.ask("GET", f"/images/{image}", status=404)


def test_a_zip_cannot_write_elsewhere(person):
    stream = io.BytesIO()
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/b.png", picture("red"))
        archive.writestr("../../out.png", picture("green"))
        archive.writestr("/abs.png", picture("blue"))
        archive.writestr("C:\\abs.png", picture("black"))
        archive.writestr(link, "/etc/passwd")
        archive.writestr("notes.txt", "no image")
    found = upload(person, ("many.zip", stream.getvalue()))
    assert [image["name"] for image in found["added"]] == ["uploads/b.png"]
    reasons = {one["name"]: one["reason"] for one in found["refused"]}
    assert set(reasons) == {"../../out.png", "/abs.png", "C:\\abs.png", "link.png", "notes.txt"} or set(reasons) == {
        "../../out.png",
        "/abs.png",
        "C:/abs.png",
        "link.png",
        "notes.txt",
    }
    assert reasons["link.png"] == "it is a link" and "leads out" in reasons["../../out.png"]


def test_bombs_and_large_files_are_refused(serve):
    person = serve(max_pixels=1000, max_upload_mb=1)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", b"\0" * (200 << 20))
    found = upload(person, ("big.png", picture(size=(100, 11))), ("bomb.zip", stream.getvalue()))
    assert [one["name"] for one in found["refused"]] == ["big.png", "bomb.zip"]
    answer = person.client.post("/api/projects/1/images", files=[("files", ("a.png", b"\0" * (2 << 20)))])
    assert answer.status_code == 413


def test_files_outside_the_folder_are_neither_listed_nor_served(serve, own_scenes, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture())
    (own_scenes / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    person = serve()
    assert len(person.images()) == 6
    inside = own_scenes / "images" / person.images()[0]["name"]
    inside.unlink()
    inside.symlink_to(tmp_path / "secret.png")
    person.ask("GET", f"/images/{person.images()[0]['id']}/file", status=404)


def test_a_damaged_image_is_passed_over_and_marked(serve, own_scenes):
    (own_scenes / "images" / "000.png").write_bytes(b"no image")
    person = serve()
    broken = next(image for image in person.images() if image["name"].endswith("000.png"))
    person.ask("POST", f"/images/{broken['id']}/open", {"holder": "me"}, 415)
    assert person.get(f"/images/{broken['id']}")["status"] == "unreadable"
    assert person.ask("POST", "/projects/1/next", {"holder": "me"})["image"]["id"] != broken["id"]
    person.ask("GET", f"/images/{broken['id']}/file", status=415)
    person.ask("GET", f"/images/{broken['id']}/thumbnail", status=415)


@pytest.mark.parametrize("path", ["/images/99", "/images/99/boxes", "/boxes/99/crop", "/projects/9/images"])
def test_what_is_not_there_is_said_so(person, path):
    assert "there is no" in person.ask("GET", path, status=404)["detail"]


def test_a_crop_shows_the_box(person):
    class_id, image = person.make_class(), person.images()[0]["id"]
    box = person.draw(image, (class_id, [10, 10, 40, 30]))["boxes"][0]
    picture_of_it = Image.open(io.BytesIO(person.get(f"/boxes/{box['id']}/crop", size=64)))
    assert max(picture_of_it.size) == 64
