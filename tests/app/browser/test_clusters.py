"""Pseudo-classes on the page: crops that are another kind are picked, moved, and moved back."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from simdetr.data.label_files import write_labels


@pytest.fixture
def pretrained(serve, tmp_path, make_labels, small_detector):
    """A server over four photographs in which a pretraining found two pseudo-classes, of 8 and of 4 boxes."""
    boxes = [(10, 10, 90, 90, 0, 0.9), (100, 10, 180, 90, 0, 0.8), (10, 100, 90, 180, 1, 0.7)]
    labels = make_labels({f"{number:03d}.jpg": boxes for number in range(4)}, (1, 2))
    write_labels(labels, tmp_path / "run" / "stage1" / "labels.parquet")
    (tmp_path / "run" / "stage1" / "detector").symlink_to(small_detector)
    return serve(photos=4, run=tmp_path / "run", device="cpu")


def test_picked_crops_become_a_cluster_and_undo_brings_them_back(page, pretrained):
    site = pretrained
    page.goto(site.screen("clusters"))
    cards = page.get_by_test_id("cluster")
    expect(cards).to_have_count(2)
    expect(page.get_by_test_id("undo-clusters")).to_be_disabled()
    cards.nth(0).get_by_test_id("pick-crops").click()
    crops = page.get_by_test_id("crop")
    expect(crops).to_have_count(8)
    expect(page.get_by_test_id("move-crops")).to_be_disabled()
    crops.nth(0).click()
    crops.nth(2).click(modifiers=["Shift"])
    crops.nth(1).click()
    expect(page.locator("[data-testid=crop][aria-pressed=true]")).to_have_count(2)
    names = crops.evaluate_all("found => found.map(one => one.getAttribute('aria-label'))")
    page.get_by_test_id("move-crops").click()
    expect(crops).to_have_count(6)
    left = [name for place, name in enumerate(names) if place not in (0, 2)]
    assert crops.evaluate_all("found => found.map(one => one.getAttribute('aria-label'))") == left
    expect(page.get_by_test_id("toast").last).to_contain_text("2 crops moved to picked crops")
    crops.nth(0).focus()
    page.keyboard.press("Space")
    page.get_by_test_id("move-crops").click()  # the same place as before
    expect(crops).to_have_count(5)
    page.get_by_test_id("close-crops").click()
    expect(page.get_by_test_id("pick-crops-dialog")).to_have_count(0)
    cards.filter(has_text="5 boxes").get_by_test_id("pick-crops").click()
    expect(crops).to_have_count(5)
    assert crops.evaluate_all("found => found.map(one => one.getAttribute('aria-label'))") == left[1:]
    page.get_by_test_id("close-crops").click()
    expect(cards).to_have_count(3)
    expect(page.locator(".cluster", has_text="3 boxes · 3 crops moved here")).to_have_count(1)
    page.get_by_test_id("undo-clusters").click()
    expect(page.locator(".cluster", has_text="2 boxes · 2 crops moved here")).to_have_count(1)
    page.get_by_test_id("undo-clusters").click()
    expect(cards).to_have_count(2)
    page.get_by_test_id("redo-clusters").click()
    expect(cards).to_have_count(3)
    assert [one["boxes"] for one in site.ask("GET", "/projects/1/clusters")["clusters"]] == [6, 4, 2]
