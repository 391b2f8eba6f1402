"""axe finds nothing on any screen, in light and in dark colours."""

from __future__ import annotations

from importlib.resources import files

import pytest
from playwright.sync_api import expect

from tests.app.browser.stage import opened

SCREENS = ("label", "fewshot", "clusters", "train", "progress", "results", "stop", "export")
SETTLE_MS = 400


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_playwright_python", reason="axe comes with `pip install axe-playwright-python`")
    return files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")


def violations(page, axe: str) -> list[str]:
    page.evaluate(axe)
    found = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{one['id']} ({one['impact']}): {one['help']}: {[node['html'][:160] for node in one['nodes'][:4]]}"
        for one in found
    ]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_on_any_screen(page, serve, axe, colours):
    site = serve()
    cat = site.add_class("cat")
    site.add_class("고양이")
    first, second = (image["id"] for image in site.images())
    site.propose(first, cat, [([20, 20, 220, 200], 0.9), ([300, 200, 400, 300], 0.6)])
    page.emulate_media(color_scheme=colours, reduced_motion="reduce")
    page.goto(site.url)
    expect(page.get_by_test_id("project")).to_have_count(1)
    found = {"projects": violations(page, axe)}
    page.get_by_test_id("new-project").click()
    found["new project"] = violations(page, axe)
    page.keyboard.press("Escape")
    opened(page, site.screen("label", first))
    expect(page.locator(".box.selected")).to_have_count(1)
    found["label with a box"] = violations(page, axe)
    page.keyboard.press("?")
    found["keys"] = violations(page, axe)
    page.keyboard.press("Escape")
    opened(page, site.screen("label", second))
    found["label without"] = violations(page, axe)
    for screen in SCREENS[1:]:
        page.goto(site.screen(screen))
        expect(page.get_by_test_id(f"screen-{screen}")).to_be_visible()
        page.wait_for_timeout(SETTLE_MS)
        found[screen] = violations(page, axe)
    assert {screen: some for screen, some in found.items() if some} == {}


def test_the_switch_of_colours_outlives_a_reload(page, serve):
    site = serve()
    page.emulate_media(color_scheme="light")
    page.goto(site.url)
    ground = "() => getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_test_id("theme").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
