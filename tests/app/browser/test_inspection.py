"""A person at work: without a mouse, through twenty images; classes of any script; names that look like markup."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.app.browser.photos import draw_photos
from tests.app.browser.stage import BOX, drag, opened, saved


def test_twenty_images_are_inspected_by_keys_alone(page, serve):
    site = serve(photos=20)
    cat = site.add_class("cat")
    dog = site.add_class("dog")
    images = sorted(image["id"] for image in site.images())  # the order of the queue
    for image in images:
        site.propose(image, cat, [([20, 20, 120, 100], 0.9), ([200, 200, 300, 300], 0.6), ([5, 5, 30, 30], 0.1)])
    opened(page, site.screen("label"))
    for done in range(20):
        expect(page.get_by_test_id("inspected-count")).to_contain_text(f"{done} of 20")
        expect(page.locator(f"{BOX}.proposed")).to_have_count(2)  # the third is below the score that is shown
        page.keyboard.press("a")
        if done % 3 == 0:
            page.keyboard.press("r")
        elif done % 3 == 1:
            page.keyboard.press("2")
        page.keyboard.press("Enter" if done % 2 else "Space")
    expect(page.get_by_test_id("cover")).to_contain_text("Nothing is left to do")
    assert {image["status"] for image in site.images()} == {"inspected"}
    for place, image in enumerate(images):
        boxes = site.boxes(image, rejected=True)
        second = [("rejected", cat), ("corrected", dog), ("inspected", cat)][place % 3]
        assert [(box["status"], box["class_id"]) for box in boxes] == [("inspected", cat), second]


def test_the_surest_proposal_is_selected_and_every_key_acts_on_it_at_once(page, serve):
    site = serve()
    cat, dog = site.add_class("cat"), site.add_class("dog")
    image = site.images()[0]["id"]
    places = [[20, 20, 120, 100], [200, 200, 300, 300], [320, 20, 420, 90]]
    site.propose(image, cat, list(zip(places, (0.5, 0.9, 0.7), strict=True)))
    opened(page, site.screen("label", image))
    chosen = page.locator(f"{BOX}.selected")
    row = page.locator(".box-row.selected")
    expect(chosen).to_have_attribute("aria-label", re.compile("Box 1: cat, proposed, 90.%"))
    expect(row).to_contain_text("0.90")
    page.keyboard.press("2")
    expect(chosen).to_have_attribute("aria-label", re.compile("Box 2: cat, proposed, 70.%"))
    page.keyboard.press("1")
    expect(chosen).to_have_attribute("aria-label", re.compile("Box 3: cat, proposed, 50.%"))
    page.keyboard.press("r")
    expect(chosen).to_have_count(0)  # a further key changes nothing that is settled
    page.keyboard.press("2")
    saved(page)
    status = {tuple(box["xyxy"]): (box["status"], box["class_id"]) for box in site.boxes(image, rejected=True)}
    assert [status[tuple(place)] for place in places] == [("rejected", cat), ("corrected", dog), ("inspected", cat)]

    page.keyboard.press("Control+z")
    expect(chosen).to_have_attribute("aria-label", re.compile("Box 3: cat, proposed, 50.%"))
    page.keyboard.press("Control+z")  # what is taken back is selected: the next key is for it
    expect(chosen).to_have_attribute("aria-label", re.compile("Box 2: cat, proposed, 70.%"))
    page.keyboard.press("Control+Shift+z")
    expect(chosen).to_have_attribute("aria-label", re.compile("Box 2: cat, inspected, 70.%"))
    page.keyboard.press("Enter")  # accepts what is left
    expect(page.get_by_test_id("inspected-count")).to_contain_text("1 of 2")
    assert sorted(box["status"] for box in site.boxes(image)) == ["corrected", "inspected", "inspected"]


def test_a_box_is_drawn_within_the_selected_one_with_shift(page, serve):
    site = serve()
    image = site.images()[0]["id"]
    whole = [5, 5, 600, 460]
    site.propose(image, site.add_class("cat"), [(whole, 0.9)])
    opened(page, site.screen("label", image))
    page.keyboard.down("Shift")
    drag(page, (100, 100), (200, 200))
    page.keyboard.up("Shift")
    saved(page)
    found = {box["status"]: box["xyxy"] for box in site.boxes(image)}
    assert found["proposed"] == whole and found["manual"] == pytest.approx([100, 100, 200, 200], abs=0.7)


def test_a_class_is_made_by_its_name_and_the_drawn_box_waits_for_it(page, serve):
    site = serve()
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    drag(page, (100, 100), (200, 200))
    expect(page.get_by_test_id("class-input")).to_be_focused()
    assert site.boxes(image) == []
    page.keyboard.type("<img src=x onerror=alert(1)>")
    page.keyboard.press("Enter")
    saved(page)
    expect(page.locator(".tag-name")).to_have_text("<img src=x onerror=alert(1)>")
    expect(page.locator(BOX)).to_have_attribute("aria-label", "Box 1: <img src=x onerror=alert(1)>, manual")
    assert page.locator("#main img[src=x]").count() == 0
    saved(page)
    assert len(site.boxes(image)) == 1


def test_an_image_without_objects_is_inspected_and_a_skipped_one_is_not(page, serve):
    site = serve(photos=3)
    opened(page, site.screen("label"))
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("inspected-count")).to_contain_text("1 of 3")
    page.keyboard.press("s")
    expect(page.get_by_test_id("inspected-count")).to_contain_text("1 skipped")
    assert [image["status"] for image in site.images()] == ["inspected", "skipped", "in_inspection"]


def test_the_question_mark_lists_the_keys_and_escape_ends_the_list(page, serve):
    site = serve()
    opened(page, site.screen("label"))
    page.keyboard.press("?")
    expect(page.get_by_test_id("keys")).to_contain_text("save as inspected, next image")
    page.keyboard.press("Enter")  # on its own button: closes, and inspects nothing
    expect(page.get_by_test_id("keys")).to_have_count(0)
    assert {image["status"] for image in site.images()} <= {"new", "in_inspection"}


def test_keys_are_for_the_next_image_at_once_and_what_is_left_is_counted(page, serve):
    """The counts, which come later, hold no key back."""
    site = serve(photos=3)
    kind = site.add_class("cat")
    first, second, _ = (image["id"] for image in site.images())
    for image in (first, second):
        site.propose(image, kind, [([20, 20, 120, 120], 0.9)])
    opened(page, site.screen("label"))
    held = []
    page.route("**/api/projects/1", lambda route: held.append(route))
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("image-name")).to_have_text(site.images()[1]["name"])
    expect(page.locator(f"{BOX}.proposed")).to_have_count(1)
    page.keyboard.press("a")
    expect(page.locator(f"{BOX}.inspected")).to_have_count(1)
    assert held and site.boxes(first)[0]["status"] == "inspected"
    page.unroute("**/api/projects/1")  # what was held goes on
    expect(page.get_by_test_id("queue-note")).to_contain_text("2 to do")


def test_proposals_below_the_score_are_spoken_of_and_not_taken_for_an_empty_image(page, serve):
    site = serve()
    image = site.images()[0]["id"]
    site.propose(image, site.add_class("cat"), [([20, 20, 120, 120], 0.1)])
    opened(page, site.screen("label", image))
    expect(page.get_by_test_id("box-list")).to_contain_text("lower score")
    expect(page.get_by_test_id("hidden-note")).to_contain_text("1 proposal below 0.30")
    expect(page.get_by_test_id("class")).to_have_text("cat01")  # no box, key 1
    expect(page.get_by_test_id("queue-item").first).not_to_contain_text("box")
    only = page.get_by_test_id("only-hidden")
    expect(only).to_contain_text("1 proposal below 0.30, none above.")
    page.get_by_test_id("show-best").click()
    expect(page.get_by_test_id("min-score-text")).to_have_text("0.10")
    expect(only).to_be_hidden()
    expect(page.get_by_test_id("class")).to_have_text("cat11")
    expect(page.get_by_test_id("queue-item").first).to_contain_text("1 box")
    expect(page.locator(f"{BOX}.selected")).to_have_count(1)


def test_of_many_weak_proposals_the_best_are_shown_at_once(page, serve):
    site = serve()
    image = site.images()[0]["id"]
    places = [([20 * number, 20, 20 * number + 15, 60], 0.28 - 0.01 * number) for number in range(25)]
    site.propose(image, site.add_class("cat"), places)
    opened(page, site.screen("label", image))
    expect(page.locator(BOX)).to_have_count(0)
    page.get_by_test_id("show-best").click()
    expect(page.locator(BOX)).to_have_count(14)  # the ten surest reach 0.19; the slider stands on 0.15
    expect(page.get_by_test_id("hidden-note")).to_contain_text("11 proposals below 0.15 hidden")
    expect(page.locator(f"{BOX}.selected")).to_have_count(1)


def test_the_image_before_is_found_also_after_a_reload_although_it_is_done(page, serve):
    site = serve(photos=3)
    opened(page, site.screen("label"))
    for done in ("1 of 3", "2 of 3"):
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("inspected-count")).to_contain_text(done)
    page.reload()
    name = page.get_by_test_id("image-name")
    for expected in ("002.jpg", "001.jpg", "000.jpg"):
        expect(name).to_have_text(expected)
        page.get_by_test_id("editor").focus()
        page.keyboard.press("[")
    expect(page.get_by_test_id("toast").last).to_contain_text("This is the first image.")


def test_the_end_of_a_long_name_is_seen_in_the_queue(page, serve, tmp_path):
    folder = tmp_path / "long"
    draw_photos(folder, 2)
    names = [f"the_same_long_beginning_of_all_names_{number:05d}.jpg" for number in range(2)]
    for photo, name in zip(sorted(folder.iterdir()), names, strict=True):
        photo.rename(folder / name)
    site = serve(photos=0, images=folder)
    opened(page, site.screen("label"))
    expect(page.locator(".queue-name")).to_have_text(names)
    assert page.locator(".name-tail").all_inner_texts() == ["s_00000.jpg", "s_00001.jpg"]
    box, tail = (page.locator(one).first.bounding_box() for one in (".queue-name", ".name-tail"))
    assert tail["x"] + tail["width"] <= box["x"] + box["width"] + 1


def test_the_queue_counts_what_is_found_while_proposals_are_mined(page, serve):
    site = serve(photos=3)
    kind = site.add_class("cat")
    first, second, _ = (image["id"] for image in site.images())
    opened(page, site.screen("label", first))
    run = {"id": 1, "kind": "mine", "state": "running", "done": 1, "total": 3, "position": None, "progress": 0.3}
    run |= {"parameters": {}, "unit": "images", "message": "", "artefacts": []}
    page.route("**/projects/1/runs?*", lambda route: route.fulfill(json={"runs": [run]}))
    site.propose(second, kind, [([20, 20, 120, 120], 0.9)])
    page.evaluate("location.reload()")
    item = page.locator(f"[data-image='{second}']")
    expect(item).to_contain_text("1 box")
    site.propose(second, kind, [([200, 20, 300, 120], 0.9)])
    run["done"] = 2
    expect(item).to_contain_text("2 boxes")


def test_the_estimate_of_errors_is_said_once_and_in_one_manner(page, serve):
    site = serve()
    left = {"total": 26300.4, "low": 24000.2, "high": 28999.6, "confidence": 0.95, "wrong": 26000, "missed": 300.4}
    found = {"errors_left": left | {"basis": "20 images of an audit"}, "left_detections": 26542, "left_images": 900}
    found |= {"next_20": {"errors_found": 635.0, "minutes": 1.2}, "why": "between 24000 and 29000 errors are left"}
    counts = dict.fromkeys(("inspected", "accepted", "corrected", "rejected", "drawn"), 3)
    page.route("**/estimate?*", lambda route: route.fulfill(json=found | counts))
    page.goto(site.screen("stop"))
    estimate = page.get_by_test_id("estimate")
    expect(estimate).to_contain_text("26,300 errors left")
    expect(estimate).to_contain_text("between 24,000 and 29,000, at 95 %")
    expect(estimate).to_contain_text("about 635 errors in about 1 minute of your time")
    expect(estimate).not_to_contain_text("errors are left")
    expect(estimate).to_contain_text("26,542without mined ones")
