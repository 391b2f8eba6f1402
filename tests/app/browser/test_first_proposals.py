"""Boxes that were mined: they come by themselves, one key names and accepts one, and those not taken up are gone."""

from __future__ import annotations

from playwright.sync_api import expect

from simdetr.app.tables import BoxSource
from tests.app.browser.stage import BOX, drag, opened, saved

PLACES = [([20, 20, 120, 100], 0.9), ([200, 200, 300, 300], 0.2), ([5, 5, 30, 30], 0.1), ([150, 20, 190, 60], 0.05)]


def test_one_key_names_and_accepts_and_what_was_not_named_is_gone(page, serve):
    site = serve(photos=1)
    image = site.images()[0]["id"]
    unnamed = site.ask("POST", "/projects/1/classes", {"name": "object", "kind": "pseudo"})["id"]
    cat, dog = site.add_class("cat"), site.add_class("dog")
    site.propose(image, unnamed, PLACES, BoxSource.MINED)
    opened(page, site.screen("label", image))
    expect(page.locator(f"{BOX}.proposed")).to_have_count(4)  # whatever their scores, until the slider is moved
    page.get_by_test_id("min-score").fill("0.3")
    expect(page.locator(f"{BOX}.proposed")).to_have_count(1)
    expect(page.get_by_test_id("hidden-note")).to_contain_text("3 proposals below 0.30 hidden")
    expect(page.get_by_test_id("only-hidden")).to_be_hidden()
    page.get_by_test_id("show-hidden").click()
    expect(page.locator(f"{BOX}.proposed")).to_have_count(4)
    expect(page.get_by_test_id("min-score-text")).to_have_text("0.05")
    expect(page.get_by_test_id("class")).to_have_text(["cat01", "dog02", "no name yet4"])
    page.keyboard.press("2")
    page.keyboard.press("1")  # the next one is selected by itself
    page.keyboard.press("a")  # accepted with the current class
    saved(page)
    expect(page.locator(f"{BOX}.inspected")).to_have_count(3)
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("cover")).to_contain_text("Nothing is left to do")
    boxes = site.boxes(image, rejected=True)
    assert [(box["status"], box["class_id"]) for box in boxes] == [("inspected", one) for one in (dog, cat, cat)]


def test_without_any_class_the_first_name_is_asked_for_and_typed_once(page, serve):
    site = serve(photos=1)
    image = site.images()[0]["id"]
    unnamed = site.ask("POST", "/projects/1/classes", {"name": "object", "kind": "pseudo"})["id"]
    site.propose(image, unnamed, PLACES[:3], BoxSource.MINED)
    opened(page, site.screen("label", image))
    page.keyboard.press("a")
    expect(page.get_by_test_id("class-input")).to_be_focused()
    page.keyboard.type("고양이")
    page.keyboard.press("Enter")
    expect(page.locator(f"{BOX}.inspected")).to_have_count(1)
    page.keyboard.press("Shift+A")
    saved(page)
    expect(page.locator(f"{BOX}.inspected")).to_have_count(3)
    named = next(row for row in site.ask("GET", "/projects/1/classes")["classes"] if row["name"] == "고양이")
    assert {(box["status"], box["class_id"]) for box in site.boxes(image)} == {("inspected", named["id"])}


def test_the_first_proposals_come_while_the_image_is_open(page, serve):
    site = serve(photos=2, propose=True, device="cpu")
    opened(page, site.screen("label", site.images()[0]["id"]))
    expect(page.locator(f"{BOX}.proposed").first).to_be_visible(timeout=120_000)
    expect(page.locator(".tag-name").first).to_have_text("?")
    page.goto(site.screen("progress"))
    expect(page.locator(".run-title")).to_contain_text("First proposals")


def test_classes_typed_in_advance_accept_no_proposal(page, serve):
    site = serve(photos=1)
    image = site.images()[0]["id"]
    unnamed = site.ask("POST", "/projects/1/classes", {"name": "object", "kind": "pseudo"})["id"]
    site.propose(image, unnamed, PLACES[:2], BoxSource.MINED)
    opened(page, site.screen("label", image))
    expect(page.locator(f"{BOX}.selected")).to_have_count(1)
    for name in ("WBC", "RBC"):
        page.keyboard.press("c")
        page.keyboard.type(name)
        page.keyboard.press("Enter")
        expect(page.locator("[data-testid=class][aria-pressed=true]")).to_contain_text(name)
    expect(page.get_by_test_id("toast").last).to_contain_text("Boxes that you draw now are “RBC”.")
    assert {(box["status"], box["class_id"]) for box in site.boxes(image)} == {("proposed", unnamed)}
    drag(page, (400, 300), (500, 400))
    saved(page)
    page.locator("[data-testid=box-row]").first.click()
    page.keyboard.press("c")
    page.keyboard.type("wbc")  # one that is there, as its digit
    page.keyboard.press("Enter")
    saved(page)
    names = {one["id"]: one["name"] for one in site.ask("GET", "/projects/1/classes")["classes"]}
    found = sorted((box["status"], names[box["class_id"]]) for box in site.boxes(image))
    assert found == [("inspected", "WBC"), ("manual", "RBC"), ("proposed", "object")]
