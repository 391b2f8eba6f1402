"""No edit is lost: two tabs, a server that fails, a tab that was closed too early."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.app.browser.stage import BOX, corners, drag, in_image, on_screen, opened, saved


@pytest.mark.parametrize(("choice", "kept"), [("keep-mine", [100.0]), ("take-theirs", [400.0])])
def test_the_second_of_two_tabs_is_asked_whose_boxes_count(page, context, serve, watch, choice, kept):
    watch.expected += ["409"]
    site = serve()
    site.add_class("cat")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    other = context.new_page()
    other.goto(site.screen("label", image))
    expect(other.get_by_test_id("taken")).to_contain_text("Somebody has this image open")
    other.get_by_test_id("open-anyway").click()
    expect(other.get_by_test_id("cover")).to_be_hidden()
    drag(other, (400, 300), (500, 400))
    saved(other)
    page.bring_to_front()
    drag(page, (100, 100), (200, 200))
    conflict = page.get_by_test_id("conflict")
    expect(conflict).to_contain_text("This image was changed elsewhere")
    expect(conflict.locator("rect")).to_have_count(2)
    conflict.get_by_test_id(choice).click()
    saved(page)
    expect(page.locator(BOX)).to_have_count(1)
    assert [box["xyxy"][0] for box in site.boxes(image)] == pytest.approx(kept, abs=1)


def test_what_could_not_be_saved_is_kept_said_and_saved_later(page, context, serve, watch):
    watch.expected += ["ERR_FAILED"]
    site = serve()
    site.add_class("cat")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    context.route("**/boxes", lambda route: route.abort() if route.request.method == "PUT" else route.continue_())
    drag(page, (100, 100), (200, 200))
    drag(page, (300, 100), (400, 200))
    expect(page.get_by_test_id("banner")).to_contain_text("not saved yet")
    expect(page.get_by_test_id("save-state")).to_have_text("Not saved yet")
    expect(page.locator(BOX)).to_have_count(2)
    assert site.boxes(image) == []
    context.unroute("**/boxes")
    page.get_by_test_id("retry-save").click()
    saved(page)
    expect(page.get_by_test_id("banner")).to_be_hidden()
    assert [round(box["xyxy"][0]) for box in site.boxes(image)] == [100, 300]


def test_an_edit_that_a_reload_cut_off_comes_back(page, context, serve, watch):
    watch.expected += ["ERR_FAILED"]
    site = serve()
    site.add_class("cat")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    page.on("dialog", lambda dialog: dialog.accept())
    context.route("**/boxes", lambda route: route.abort() if route.request.method == "PUT" else route.continue_())
    drag(page, (100, 100), (200, 200))
    expect(page.get_by_test_id("banner")).to_be_visible()
    context.unroute("**/boxes")
    context.route("**/boxes", lambda route: route.abort() if route.request.method == "PUT" else route.continue_())
    page.reload()
    context.unroute("**/boxes")
    expect(page.locator(BOX)).to_have_count(1)
    saved(page)
    expect(page.get_by_test_id("banner")).to_be_hidden()
    assert len(site.boxes(image)) == 1


def test_proposals_that_a_run_wrote_meanwhile_join_what_is_being_drawn(page, serve, watch):
    watch.expected += ["409"]
    site = serve()
    cat = site.add_class("cat")
    image = site.images()[0]["id"]
    site.propose(image, cat, [([10, 10, 60, 60], 0.9)])
    opened(page, site.screen("label", image))
    expect(page.locator(BOX)).to_have_count(1)
    site.propose(image, cat, [([300, 300, 360, 360], 0.8)])
    drag(page, (100, 100), (200, 200))
    saved(page)
    expect(page.locator(BOX)).to_have_count(3)
    expect(page.get_by_test_id("conflict")).to_have_count(0)
    assert [box["status"] for box in site.boxes(image)] == ["proposed", "proposed", "manual"]


def test_no_box_is_lost_while_answers_arrive_during_the_next_drag(page, context, serve):
    site = serve()
    site.add_class("cat"), site.add_class("dog")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    client = context.new_cdp_session(page)
    client.send("Network.enable")
    slow = {"offline": False, "latency": 300, "downloadThroughput": -1, "uploadThroughput": -1}
    client.send("Network.emulateNetworkConditions", slow)
    page.keyboard.press("2")
    wanted = []
    for number in range(12):
        x, y = 20 + number % 4 * 150, 20 + number // 4 * 150
        page.mouse.move(*on_screen(page, x, y))
        page.mouse.down()
        for step in (30, 60, 90):
            page.mouse.move(*on_screen(page, x + step, y + step))
            page.wait_for_timeout(120)  # held, so that the answer about the box before comes meanwhile
        page.mouse.up()
        wanted.append(in_image(page, *on_screen(page, x, y)) + in_image(page, *on_screen(page, x + 90, y + 90)))
        expect(page.locator(BOX)).to_have_count(number + 1)
        expect(page.locator(f"{BOX}.selected")).to_have_count(1)
    page.mouse.move(*on_screen(page, 300, 120))  # and one that only looks around
    saved(page)
    page.reload()
    expect(page.locator(BOX)).to_have_count(12)
    found = sorted(corners(page, place) for place in range(12))
    assert found == [pytest.approx(box, abs=0.5) for box in sorted(map(list, wanted))]
    assert {box["class_id"] for box in site.boxes(image)} == {2}
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("inspected-count")).to_contain_text("1 of 2")


def test_boxes_that_a_server_refuses_are_kept_said_and_go_with_the_next_edit(page, context, serve, watch):
    watch.expected += ["422"]
    site = serve()
    site.add_class("cat")
    image = site.images()[0]["id"]
    opened(page, site.screen("label", image))
    answer = {"status": 422, "content_type": "application/json", "body": '{"detail": "the box is too odd"}'}
    context.route(
        "**/boxes", lambda route: route.fulfill(**answer) if route.request.method == "PUT" else route.continue_()
    )
    drag(page, (100, 100), (200, 200))
    expect(page.get_by_test_id("banner")).to_contain_text("not saved. The box is too odd")
    expect(page.get_by_test_id("save-state")).to_have_text("Not saved")
    page.keyboard.press("Enter")
    expect(page.locator(BOX)).to_have_count(1)
    expect(page.get_by_test_id("inspected-count")).to_contain_text("0 of 2")
    expect(page.get_by_test_id("save-state")).to_have_text("Not saved")
    context.unroute("**/boxes")
    drag(page, (300, 100), (400, 200))
    saved(page)
    expect(page.get_by_test_id("banner")).to_be_hidden()
    assert [round(box["xyxy"][0]) for box in site.boxes(image)] == [100, 300]
