"""Where things are on the editor's stage, measured from the picture itself and not from what the editor says."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

EDITOR = "[data-testid=editor]"
BOX = "[data-testid=box]"


def opened(page: Page, address: str) -> None:
    """Open the Label screen and wait until the image is there."""
    page.goto(address)
    image = re.search(r"/label/(\d+)$", address)
    picture = re.compile(rf"/images/{image[1] if image else ''}.*file$")
    expect(page.locator(f"{EDITOR} img")).to_have_attribute("src", picture)
    expect(page.get_by_test_id("cover")).to_be_hidden()
    page.eval_on_selector(f"{EDITOR} img", "img => img.decode()")  # to wait by polling is against the page's policy


def zoom_to(page: Page, zoom: float) -> None:
    page.eval_on_selector(EDITOR, "(editor, zoom) => editor.zoomTo(zoom)", zoom)


def _frame(page: Page) -> tuple[float, float, float]:
    """Left, top and scale of the picture in the window."""
    return page.eval_on_selector(
        f"{EDITOR} img",
        "img => { const r = img.getBoundingClientRect(); return [r.left, r.top, r.width / img.naturalWidth] }",
    )


def on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image is in the window."""
    left, top, scale = _frame(page)
    return left + x * scale, top + y * scale


def in_image(page: Page, x: float, y: float) -> tuple[float, float]:
    """Which pixel of the image is at a place of the window."""
    left, top, scale = _frame(page)
    return (x - left) / scale, (y - top) / scale


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag from a pixel of the image to another."""
    page.mouse.move(*on_screen(page, *start))
    page.mouse.down()
    page.mouse.move(*on_screen(page, *end), steps=8)
    page.mouse.up()


def corners(page: Page, place: int = 0) -> list[float]:
    """The corners of a drawn box, in image pixels, as they are in the document."""
    return (
        page.locator(f"{BOX}:not(.rejected) .edge")
        .nth(place)
        .evaluate(
            "r => { const [x, y, w, h] = ['x', 'y', 'width', 'height'].map(n => Number(r.getAttribute(n)));"
            " return [x, y, x + w, y + h] }"
        )
    )


def saved(page: Page) -> None:
    """Wait until everything is written."""
    expect(page.get_by_test_id("save-state")).to_have_text("Saved")
