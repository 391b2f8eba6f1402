"""How far the labelling page's boxes lag behind the pointer, and how soon the next image is there.

    python -m benchmarks.app_editor [--moves 200] [--boxes 0 50 300] [--images 20]

Serves drawn scenes of 640 x 480 px, puts boxes on them, and works in a headless Chromium of the system, alone and while
a training runs. The pointer draws a box, moves it and pulls a handle: measured in the page, from when a `pointermove`
was made to when the rectangle in the document has its new edge, and to the next frame; a frame of 60 Hz has 16.7 ms.
The next image is asked for by Enter (which saves this one as inspected), by S (skip) and by a click in the list:
measured from the key or click to the frame in which its picture is decoded and all its boxes are in the document.
Needs chromium and the dev extra.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from benchmarks.app_site import Site, begin_training, keep, load, scenes, served, wait_until_read

WIDTH, HEIGHT = 640, 480
BOXES_NEXT = 20
"""Boxes on each image that is gone to."""
_TRAINED_ON = 8
LISTEN = """() => {
    window.lags = [];
    window.frames = [];
    const stage = document.querySelector("box-editor .stage");
    stage.addEventListener("pointermove", (event) => {
        if (!event.buttons) return;
        window.lags.push(performance.now() - event.timeStamp);
        requestAnimationFrame(() => window.frames.push(performance.now() - event.timeStamp));
    });
}"""
WATCH = """(boxes) => {
    window.shown = [];
    const image = () => document.querySelector("box-editor img");
    const begin = (event) => {
        if (event.type === "keydown" ? !["Enter", "s"].includes(event.key) : !event.target.closest(".queue-item"))
            return;
        const before = image().src;
        const look = () => {
            const now = image();
            const there = now.src && now.src !== before && now.complete && now.naturalWidth;
            if (there && document.querySelectorAll("[data-testid=box]").length === boxes)
                now.decode().then(() =>
                    requestAnimationFrame(() => window.shown.push(performance.now() - event.timeStamp)));
            else requestAnimationFrame(look);
        };
        requestAnimationFrame(look);
    };
    document.addEventListener("keydown", begin, true);
    document.addEventListener("click", begin, true);
}"""


def put_boxes(site: Site, image: int, count: int) -> None:
    """Draw so many boxes on an image."""
    rng = np.random.default_rng(image)
    kind = site.get("/projects/1/classes")["classes"][0]["id"]
    boxes = []
    for _ in range(count):
        x, y = rng.uniform(0, WIDTH - 60), rng.uniform(0, HEIGHT - 60)
        boxes.append({"class_id": kind, "xyxy": [x, y, x + rng.uniform(15, 60), y + rng.uniform(15, 60)]})
    sheet = site.get(f"/images/{image}/boxes")
    site.must("PUT", f"/images/{image}/boxes", {"version": sheet["version"], "boxes": boxes})


def spread(times: list[float]) -> dict[str, float]:
    """Median, 95 % and most of times in ms."""
    found = {"median": statistics.median(times), "p95": float(np.percentile(times, 95)), "most": max(times)}
    return {name: round(value, 2) for name, value in found.items()}


def drag(page: Page, start: tuple[float, float], end: tuple[float, float], moves: int) -> dict[str, Any]:
    """Drag in so many moves, and say how long each took."""
    page.evaluate("() => { window.lags = []; window.frames = []; }")
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=moves)
    page.mouse.up()
    page.wait_for_timeout(300)
    return {"edge_ms": spread(page.evaluate("window.lags")), "frame_ms": spread(page.evaluate("window.frames"))}


def pointer(page: Page, site: Site, image: int, counts: list[int], moves: int) -> list[dict[str, Any]]:
    """The lag of the three drags, by the number of boxes on the image."""
    rows = []
    for count in counts:
        put_boxes(site, image, count)
        page.goto(f"http://{site.address}/#/p/1/label/{image}")
        page.reload()
        page.locator("box-editor img[src]").wait_for()
        page.wait_for_timeout(500)
        page.evaluate(LISTEN)
        for name, start, end in (
            ("draw", (300, 200), (600, 500)),
            ("move", (450, 350), (500, 400)),
            ("pull", (650, 550), (700, 600)),
        ):
            rows.append({"boxes": count, "drag": name, **drag(page, start, end, moves)})
    return rows


def following(page: Page, site: Site, images: list[int]) -> dict[str, Any]:
    """How soon the next image is there, by Enter, S and clicks, a third of the images each."""
    for image in images:
        put_boxes(site, image, BOXES_NEXT)
    page.goto(f"http://{site.address}/#/p/1/label")
    page.reload()
    page.locator("box-editor img[src]").wait_for()
    page.wait_for_timeout(1000)
    page.evaluate(WATCH, BOXES_NEXT)
    share = (len(images) - 1) // 3
    found = {}
    for name in ("enter", "skip", "click"):
        page.evaluate("() => { window.shown = []; }")
        for number in range(share):
            if name == "click":
                page.locator(".queue-item:not([aria-current])").nth(number % 2).click()
            else:
                page.keyboard.press("Enter" if name == "enter" else "s")
            until = time.monotonic() + 20  # by hand: the page's policy forbids what Playwright waits with
            while page.evaluate("window.shown.length") <= number and time.monotonic() < until:
                page.wait_for_timeout(100)
            page.wait_for_timeout(400)  # a person looks, if only for a moment
        found[f"{name}_ms"] = spread(page.evaluate("window.shown"))
    return found


def measure(folder: Path, asked: argparse.Namespace, *, training: bool) -> dict[str, Any]:
    """Both, alone or beside a training."""
    total = _TRAINED_ON + 1 + asked.images
    photos = scenes(folder / "scenes", total)
    with served(photos, folder / "out") as site, sync_playwright() as playwright:
        wait_until_read(site, total)
        site.must("POST", "/projects/1/classes", {"name": "thing"})
        if training:
            begin_training(site, range(1, _TRAINED_ON + 1))
        else:
            for image in range(1, _TRAINED_ON + 1):
                site.must("DELETE", f"/images/{image}")
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        found: dict[str, Any] = following(page, site, list(range(_TRAINED_ON + 1, total + 1)))
        found["pointer"] = pointer(page, site, _TRAINED_ON + 1, asked.boxes, asked.moves)
        browser.close()
    return found


def chromium() -> str:
    """The browser of the system."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise SystemExit("no chromium on this machine: apt-get install chromium")
    return found


def main() -> None:
    """Measure and write the part ``editor`` of ``results/labelling_app.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=200, help="of the pointer in a drag")
    parser.add_argument("--boxes", type=int, nargs="+", default=[0, 50, 300], help="on the image while dragging")
    parser.add_argument("--images", type=int, default=31, help="that are gone through")
    asked = parser.parse_args()
    found, before = {}, load()
    for name in ("alone", "training"):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(Path(folder), asked, training=name == "training")
    keep("editor", {"moves": asked.moves, "boxes_next": BOXES_NEXT, **found}, before)


if __name__ == "__main__":
    main()
