"""Boxes under the pointer and the keys: where they are drawn is where they are kept."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.app.browser.stage import BOX, corners, drag, in_image, on_screen, opened, saved, zoom_to


@pytest.mark.parametrize("zoom", [0.25, 1.0, 4.0])
def test_a_box_is_after_a_reload_where_it_was_drawn(page, serve, zoom):
    site = serve()
    site.add_class("cat")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    zoom_to(page, zoom)
    start, end = ((290.4, 210.7), (350.2, 260.9))
    drag(page, start, end)
    expect(page.locator(BOX)).to_have_count(1)
    saved(page)
    tolerance = 0.5 / min(1.0, zoom)  # the mouse itself stands on whole window pixels, of 1/zoom image pixels
    drawn = corners(page)
    assert drawn == pytest.approx([*start, *end], abs=max(0.5, tolerance))
    page.reload()
    expect(page.locator(BOX)).to_have_count(1)
    assert corners(page) == pytest.approx(drawn, abs=1e-9)
    assert site.boxes(image)[0]["xyxy"] == pytest.approx(drawn, abs=1e-9)


def test_undo_goes_back_edit_by_edit_after_a_reload_and_redo_forward(page, serve):
    site = serve()
    site.add_class("cat")
    opened(page, site.screen("label"))
    drag(page, (50, 50), (150, 140))
    saved(page)
    before = corners(page)
    drag(page, (100, 100), (140, 130))  # inside the selected one: it moves
    saved(page)
    moved = corners(page)
    expect(page.locator(f"{BOX}.manual")).to_have_count(1)  # drawn it stays, however often it is moved
    assert moved == pytest.approx([value + by for value, by in zip(before, (40, 30, 40, 30), strict=True)], abs=0.6)
    drag(page, (300, 300), (400, 400))
    saved(page)
    page.reload()
    expect(page.locator(BOX)).to_have_count(2)
    page.keyboard.press("Control+z")
    expect(page.locator(BOX)).to_have_count(1)
    assert corners(page) == pytest.approx(moved)
    page.keyboard.press("Control+z")
    saved(page)
    assert corners(page) == pytest.approx(before)
    page.keyboard.press("Control+z")
    expect(page.locator(BOX)).to_have_count(0)
    expect(page.get_by_test_id("undo")).to_be_disabled()
    for _ in range(3):
        page.keyboard.press("Control+Shift+z")
        saved(page)
    expect(page.locator(BOX)).to_have_count(2)


def test_handles_turn_a_box_over_and_no_box_leaves_the_image(page, serve):
    site = serve()
    site.add_class("cat")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    drag(page, (200, 200), (300, 300))
    drag(page, (300, 300), (100, 120))  # the lower right corner beyond the upper left one
    saved(page)
    assert corners(page) == pytest.approx([100, 120, 200, 200], abs=0.7)
    page.keyboard.press("Escape")
    drag(page, (500, 400), (630, 470))
    x, y = on_screen(page, 560, 440)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 500, y + 300, steps=5)
    page.mouse.up()
    saved(page)
    kept = [box["xyxy"] for box in site.boxes(image)]
    assert kept[1] == pytest.approx([510, 410, 640, 480], abs=1.2)
    assert kept[1][2:] == [640, 480]


def test_arrows_move_and_resize_and_many_presses_are_one_edit(page, serve):
    site = serve()
    class_id = site.add_class("cat")
    image = site.images()[0]["id"]
    site.propose(image, class_id, [([100, 100, 200, 180], 0.9)])
    opened(page, site.screen("label", image))
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Alt+ArrowRight")
    saved(page)
    expect(page.locator(f"{BOX}.corrected")).to_have_count(1)
    expect(page.get_by_test_id("undo")).to_be_enabled()
    (box,) = site.boxes(image)
    assert (box["xyxy"], box["status"]) == ([105, 110, 206, 190], "corrected")
    page.keyboard.press("Control+z")
    expect(page.locator(f"{BOX}.proposed")).to_have_count(1)
    assert corners(page) == [100, 100, 200, 180]


def test_the_wheel_zooms_about_the_pointer_between_25_and_400_percent(page, serve):
    site = serve()
    opened(page, site.screen("label"))
    page.mouse.move(500, 300)
    under = in_image(page, 500, 300)
    for _ in range(30):
        page.mouse.wheel(0, -200)
    expect(page.get_by_test_id("zoom")).to_have_text("400 %")
    assert in_image(page, 500, 300) == pytest.approx(under, abs=0.1)
    for _ in range(40):
        page.mouse.wheel(0, 200)
    expect(page.get_by_test_id("zoom")).to_have_text("25 %")
    page.keyboard.press("0")
    expect(page.get_by_test_id("zoom")).not_to_have_text("25 %")


def test_two_fingers_zoom_and_one_draws(page, serve):
    site = serve()
    site.add_class("cat")
    opened(page, site.screen("label"))
    touch = page.context.new_cdp_session(page)
    touch.send("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})

    def fingers(kind, *points):
        found = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": found})

    under = in_image(page, 630, 400)
    fingers("touchStart", (600, 400))
    fingers("touchStart", (600, 400), (660, 400))
    for step in range(1, 6):
        fingers("touchMove", (600 - 10 * step, 400), (660 + 10 * step, 400))
    fingers("touchEnd")
    width = in_image(page, 730, 400)[0] - in_image(page, 630, 400)[0]
    assert in_image(page, 630, 400) == pytest.approx(under, abs=1.5)
    assert width == pytest.approx(100 / (160 / 60) / 1.1375, rel=0.15)
    expect(page.locator(BOX)).to_have_count(0)
    fingers("touchStart", (500, 300))
    for step in range(1, 6):
        fingers("touchMove", (500 + 20 * step, 300 + 20 * step))
    fingers("touchEnd")
    expect(page.locator(BOX)).to_have_count(1)
    saved(page)
