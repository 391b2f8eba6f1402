"""A training from the page: started, watched over a reload, and its detector used."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from simdetr.app.database import writing
from simdetr.app.detectors_at_hand import files_of
from simdetr.app.tables import Project, Run, RunKind, RunState
from tests.app.browser.stage import opened

TRAINS_MS = 240_000


def labelled(site, images=10):
    cat = site.add_class("고양이")
    for image in site.images()[:images]:
        sheet = site.ask("POST", f"/images/{image['id']}/open", {"holder": "test"})
        body = {
            "version": sheet["version"],
            "boxes": [{"class_id": cat, "xyxy": [50, 50, 250, 200]}],
            "inspected": True,
        }
        site.ask("PUT", f"/images/{image['id']}/boxes", body)


@pytest.mark.slow
def test_a_training_is_watched_live_over_a_reload_and_its_detector_is_used(page, serve, tiny_config, small_detector):
    site = serve(photos=12, config=(str(tiny_config),), device="cpu", run=small_detector)
    labelled(site)
    page.goto(site.screen("train"))
    expect(page.get_by_test_id("train-data")).to_contain_text("10 inspected images of 12")
    expect(page.get_by_test_id("augmentation-preview").locator("img")).to_have_count(4)
    expect(page.get_by_test_id("memory-estimate")).to_contain_text("an estimate", timeout=TRAINS_MS)
    expect(page.get_by_test_id("device")).to_have_value("cpu")
    page.get_by_test_id("steps").fill("80")
    page.get_by_text("More", exact=True).click()
    page.get_by_test_id("validate-on").fill("0.5")
    page.get_by_test_id("start-training").click()
    expect(page.get_by_test_id("run-steps")).to_have_text(re.compile(r"[1-9]\d? / 80"), timeout=TRAINS_MS)
    page.reload()
    expect(page.get_by_test_id("chart-loss").locator("path.curve")).to_have_count(1, timeout=TRAINS_MS)
    expect(page.get_by_test_id("run-percent")).to_have_text("100 %", timeout=TRAINS_MS)
    page.get_by_test_id("see-results").click(timeout=TRAINS_MS)
    summary = page.get_by_test_id("model-summary")
    expect(summary.locator("dd").nth(1)).to_have_text(re.compile(r"[1-9][\d,]{3,}"), timeout=TRAINS_MS)
    expect(summary).to_contain_text("고양이")
    expect(page.get_by_test_id("model-scores")).to_contain_text("AP")
    expect(page.get_by_test_id("per-class")).to_contain_text("고양이")
    page.get_by_test_id("use-model").click()
    expect(page.get_by_test_id("in-use")).to_be_visible()
    assert site.ask("GET", "/projects/1")["active_model"] == "run-1"
    opened(page, site.screen("label"))
    page.keyboard.press("d")
    expect(page.get_by_test_id("toast").last).to_contain_text(re.compile("proposal|nothing"), timeout=TRAINS_MS)


def test_before_and_after_are_shown_and_nothing_is_proposed(page, serve, small_detector):
    site = serve(photos=3, device="cpu", run=small_detector)
    page.goto(site.screen("results"))
    expect(page.get_by_test_id("compare-with")).to_have_value("")
    page.get_by_test_id("compare").click()
    pictures = page.get_by_test_id("compared").locator("img")
    expect(pictures).to_have_count(6, timeout=TRAINS_MS)
    for place in range(6):
        pictures.nth(place).evaluate("img => img.decode()")
    assert {image["status"] for image in site.images()} == {"new"}
    assert site.ask("GET", "/projects/1")["boxes"] == 0
    page.goto(site.screen("progress"))  # such a look is no run to keep
    expect(page.get_by_test_id("run-detail")).to_contain_text("No run yet")
    expect(page.get_by_test_id("run")).to_have_count(0)


def trained(site, folder, *, used=False):
    """A training that has ended, with this detector."""
    desk = site.app.state.desk
    with writing(desk.engine) as session:
        run = Run(project_id=1, kind=RunKind.TRAIN, state=RunState.DONE, done=8, total=8, unit="steps")
        session.add(run)
        session.flush()
        kept = files_of(desk.settings, 1, run.id).training / "detector"
        kept.parent.mkdir(parents=True)
        kept.symlink_to(folder)
        if used:
            session.get(Project, 1).active_model = f"run-{run.id}"
        return run.id


def test_trainings_start_from_the_pretrained_detector_and_not_from_the_one_before(page, serve, small_detector):
    site = serve(run=small_detector, device="cpu")
    labelled(site, 1)
    trained(site, small_detector, used=True)
    page.goto(site.screen("train"))
    for screen in ("init", "fewshot-init"):
        choice = page.get_by_test_id(screen)
        expect(choice).to_have_value("start")
        expect(choice.locator("option[value=run-1]")).to_have_text("Training 1 (in use)")
        page.goto(site.screen("fewshot"))


def test_without_a_pretrained_detector_a_training_starts_from_scratch(page, serve, small_detector):
    site = serve(device="cpu")
    labelled(site, 1)
    trained(site, small_detector, used=True)
    page.goto(site.screen("train"))
    expect(page.get_by_test_id("init")).to_have_value("")
    expect(page.get_by_test_id("init").locator("option")).to_have_text(["Training 1 (in use)", "Scratch: no weights"])


def test_a_later_training_says_that_it_is_not_in_use_and_offers_to_be(page, serve, small_detector):
    site = serve(device="cpu")
    first, second = trained(site, small_detector, used=True), trained(site, small_detector)
    page.goto(site.screen("progress", first))
    after = page.get_by_test_id("after-training")
    expect(after).to_contain_text("This model is in use")
    page.goto(site.screen("progress", second))
    expect(after).to_contain_text("not in use yet: proposals are still made by Training 1.")
    page.get_by_test_id("use-model").click()
    expect(after).to_contain_text("This model is in use")
    assert site.ask("GET", "/projects/1")["active_model"] == f"run-{second}"


def test_nothing_to_learn_from_is_said_before_anything_starts(page, serve):
    site = serve()
    page.goto(site.screen("train"))
    expect(page.get_by_test_id("train-hint")).to_contain_text("inspect some images first")
    expect(page.get_by_test_id("start-training")).to_be_disabled()


def test_a_training_that_was_stopped_at_a_step_is_paused_and_offers_to_go_on(page, serve):
    site = serve()
    labelled(site, 1)
    desk = site.app.state.desk
    with writing(desk.engine) as session:
        session.add(Run(project_id=1, kind=RunKind.TRAIN, state=RunState.CANCELLED, done=120, total=400, unit="steps"))
        session.add(Run(project_id=1, kind=RunKind.TRAIN, state=RunState.CANCELLED))
    point = files_of(desk.settings, 1, 1).training / "checkpoints" / "resume.ckpt"
    point.parent.mkdir(parents=True)
    point.write_bytes(b"")
    page.goto(site.screen("progress", 1))
    expect(page.locator(".run-title")).to_contain_text("paused")
    expect(page.get_by_test_id("resume-run")).to_be_visible()
    expect(page.get_by_test_id("run").locator(".status")).to_have_text(["cancelled", "paused"])
    page.goto(site.screen("train"))
    expect(page.locator("li", has=page.get_by_test_id("past-run")).locator(".status")).to_have_text(
        ["cancelled", "paused"]
    )


def test_few_shots_train_as_long_as_is_set_and_say_how_long_that_takes(page, serve, watch, small_detector):
    watch.expected += ["ERR_FAILED"]
    site = serve(run=small_detector, device="cpu")
    labelled(site, 1)
    image = next(image for image in site.images() if image["status"] == "inspected")
    site.ask("POST", "/projects/1/shots", {"box_id": site.boxes(image["id"])[0]["id"]})
    page.goto(site.screen("fewshot"))
    time = page.get_by_test_id("fewshot-time")
    expect(time).to_contain_text("known once something was trained here")
    run = trained(site, small_detector)
    files_of(site.app.state.desk.settings, 1, run).tell(step=8, total_steps=8, loss=1.0, seconds_per_step=0.5)
    page.reload()
    expect(time).to_contain_text("About 6 min 40 s")
    page.get_by_test_id("fewshot-steps").fill("60")
    expect(time).to_contain_text("About 1 min 0 s")
    asked = []
    page.route("**/runs", lambda route: (asked.append(route.request.post_data_json), route.abort()))
    with page.expect_request(lambda request: request.method == "POST"):
        page.get_by_test_id("start-autolabel").click()
    assert asked[0]["kind"] == "autolabel" and asked[0]["parameters"]["max_steps"] == 60


def test_scores_are_percent_everywhere_and_one_validation_is_a_number_and_no_curve(page, serve, small_detector):
    site = serve(device="cpu")
    run = trained(site, small_detector)
    files = files_of(site.app.state.desk.settings, 1, run)
    files.tell(step=0, total_steps=8, message="training")
    files.tell(step=8, total_steps=8, loss=1.5, losses={}, lr=1e-3)
    files.tell(step=8, total_steps=8, scores={"AP": 0.00032, "AP50": 0.612})
    page.goto(site.screen("progress", run))
    log = page.get_by_test_id("run-log")
    expect(log).to_contain_text("step 8: AP 0.0 %, AP50 61.2 %")
    expect(log).to_contain_text("step 8 of 8: loss 1.500")
    expect(log).not_to_contain_text("step 0")
    page.goto(site.screen("results", f"run-{run}"))
    scores = page.get_by_test_id("chart-scores")
    expect(scores).to_contain_text("AP5061.2 %Measured once, after 8 steps.")
    expect(scores.locator("svg")).to_have_count(0)
    files.tell(step=9, total_steps=9, scores={"AP": 0.5, "AP50": 0.75})
    page.reload()
    expect(scores.locator("path.curve")).to_have_count(2)
    expect(scores.locator(".legend")).to_contain_text("AP 50.0 %")


def test_the_bar_that_starts_a_training_leaves_the_previews_to_be_seen(page, serve):
    site = serve()
    labelled(site, 1)
    page.goto(site.screen("train"))
    pictures = page.get_by_test_id("augmentation-preview").locator("img")
    expect(pictures).to_have_count(4)
    pictures.first.evaluate("img => img.decode()")
    pictures.first.scroll_into_view_if_needed()
    tile = pictures.first.bounding_box()
    bar = page.get_by_test_id("start-training").locator("xpath=ancestor::section").bounding_box()
    assert bar["height"] <= 60
    assert tile["y"] + 0.75 * tile["height"] < bar["y"]
