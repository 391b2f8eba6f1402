"""Labels out of the page in every format, and in again after a try; images uploaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from playwright.sync_api import expect

from tests.app.browser.photos import draw_photos
from tests.app.browser.stage import drag, opened, saved

NAMES = ("고양이", "كلب بني", "猫 <b>&amp;</b>")


def everything_in(path: Path) -> str:
    """The text of a file, or of all files of a zip."""
    if not zipfile.is_zipfile(path):
        return path.read_text(encoding="utf-8", errors="replace")
    with zipfile.ZipFile(path) as archive:
        return "\n".join(archive.read(name).decode("utf-8", "replace") for name in archive.namelist())


def test_names_of_any_script_come_through_every_format(page, serve, tmp_path):
    site = serve()
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    for place, name in enumerate(NAMES):
        page.keyboard.press("Escape")  # else the class would be the last box's
        page.keyboard.press("c")
        page.keyboard.type(name)
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("class")).to_have_count(place + 1)
        drag(page, (20 + 200 * place, 50), (150 + 200 * place, 200))
        saved(page)
    assert {one["name"] for one in site.ask("GET", "/projects/1/classes")["classes"]} == set(NAMES)
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("inspected-count")).to_contain_text("1 of 2")
    formats = site.ask("GET", "/formats")["write"]
    assert formats
    page.goto(site.screen("export"))
    for name in formats:
        page.get_by_test_id("export-format").select_option(name)
        with page.expect_response("**/exports"):
            page.get_by_test_id("export").click()
        expect(page.get_by_test_id("download-export")).to_have_attribute("data-format", name)
        expect(page.get_by_test_id("export-report")).to_contain_text("3 boxes on 1 image")
        with page.expect_download() as download:
            page.get_by_test_id("download-export").click()
        kept = tmp_path / f"{name}-{download.value.suggested_filename}"
        download.value.save_as(kept)
        text = everything_in(kept).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;amp;", "&amp;")
        for one in NAMES:
            assert one in text or json.dumps(one)[1:-1] in text, f"{name} lost {one}"


def test_an_import_is_tried_before_it_changes_anything(page, serve, tmp_path):
    site = serve()
    photo = site.images()[0]
    labels = {
        "images": [{"id": 1, "file_name": photo["name"], "width": 640, "height": 480}],
        "categories": [{"id": 1, "name": "кот"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 100, 80], "area": 8000, "iscrowd": 0}
        ],
    }
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(labels), encoding="utf-8")
    page.goto(site.screen("export"))
    expect(page.get_by_test_id("import")).to_be_disabled()
    page.get_by_test_id("import-file").set_input_files(path)
    page.get_by_test_id("dry-run").click()
    report = page.get_by_test_id("import-report")
    expect(report).to_contain_text("Would import: 1 box on 1 image")
    assert site.boxes(photo["id"]) == []
    page.get_by_test_id("import").click()
    expect(report).to_contain_text("Imported: 1 box on 1 image")
    assert site.boxes(photo["id"])[0]["xyxy"] == [10, 20, 110, 100]


def test_images_are_uploaded_and_what_is_no_image_is_named(page, serve, tmp_path):
    site = serve(photos=0)
    draw_photos(tmp_path / "own", 2)
    (tmp_path / "own" / "broken.jpg").write_bytes(b"no image")
    page.goto(site.screen("label"))
    expect(page.get_by_test_id("empty")).to_contain_text("No images yet")
    page.get_by_test_id("upload-files").set_input_files(sorted((tmp_path / "own").iterdir()))
    expect(page.get_by_test_id("queue-item")).to_have_count(2)
    assert len(site.images()) == 2
