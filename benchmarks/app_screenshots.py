"""Pictures of the labelling page for docs/labelling_app.md, on drawn scenes, light and dark.

    python benchmarks/app_screenshots.py [--out docs/app] [--steps 250]

Draws scenes, serves them, inspects some with their true boxes, trains on those from the page, detects on the rest, and
takes pictures of the screens on the way in a headless Chromium of the system. Takes minutes on two CPU cores. Needs
chromium and the dev extra.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image as Pictures
from playwright.sync_api import Page, sync_playwright

from simdetr.app.client import AppClient
from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings
from simdetr.data.coco import read_coco
from simdetr.data.scenes import PLAIN_CLASSES, render_scenes

SCENES, INSPECTED = 120, 80
SIZE_HW = (480, 640)
WINDOW = {"width": 1280, "height": 800}
WIDTH = 1100
"""Of the pictures, in pixels; the page is drawn twice as fine."""
MOST_KB = 150
PREVIEWED = """() => {
  const shown = [...document.querySelectorAll('[data-testid="augmentation-preview"] img')];
  return shown.length === 4 && shown.every((img) => img.complete && img.naturalWidth > 0);
}"""
"""All pictures of what training changes are there."""


def serve(folder: Path) -> tuple[uvicorn.Server, threading.Thread, AppClient]:
    """An app over drawn scenes, of which some are inspected and have their true boxes."""
    truth, _ = read_coco(render_scenes(folder / "scenes", SCENES, SIZE_HW, classes=PLAIN_CLASSES, style="plain"))
    app = create_app(AppSettings(images=folder / "scenes" / "images", out=folder / "out", port=0))
    app.state.desk.wait_for_index()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    client = AppClient(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", author="Kim")
    kinds = [
        client.ask("POST", "/projects/1/classes", {"name": one.name.replace("_", " ")})["id"]
        for one in truth.categories
    ]
    for image in client.pages("/projects/1/images", "images", order="name")[:INSPECTED]:
        own = truth.image(truth.image_ids.index(f"images/{image['name']}"))
        boxes = [
            {"class_id": kinds[kind], "xyxy": box}
            for kind, box in zip(own.classes.tolist(), own.boxes_xyxy.tolist(), strict=True)
        ]
        sheet = client.ask("GET", f"/images/{image['id']}/boxes")
        wish = {"version": sheet["version"], "boxes": boxes, "inspected": True}
        client.ask("PUT", f"/images/{image['id']}/boxes", wish)
    return server, thread, client


def keep(page: Page, out: Path, name: str) -> None:
    """The page as it stands, once in light and once in dark colours."""
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        page.wait_for_timeout(300)
        picture = Pictures.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture = picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Pictures.Resampling.LANCZOS)
        path = out / f"{name}_{theme}.webp"
        picture.save(path, quality=80, method=6)
        kilobytes = path.stat().st_size / 1000
        print(f"{path}: {kilobytes:.0f} kB")
        if kilobytes > MOST_KB:
            raise SystemExit(f"{path} is larger than {MOST_KB} kB; lower WIDTH or the quality")


def train(page: Page, client: AppClient, out: Path, steps: int) -> str:
    """Train from the page, with a picture of the start and one on the way; the run's id."""
    page.goto(f"{client.address}/#/p/1/train")
    page.get_by_test_id("augmentation-preview").locator("img").nth(3).wait_for()
    page.get_by_test_id("init").select_option("")
    page.get_by_test_id("steps").fill(str(steps))
    page.wait_for_timeout(1000)  # the previews follow the settings
    page.wait_for_function(PREVIEWED, timeout=60_000)
    keep(page, out, "train")
    page.get_by_test_id("start-training").click()
    run = None
    while run is None or run["progress"] < 0.6:
        time.sleep(1)
        runs = client.ask("GET", "/projects/1/runs")["runs"]
        for run in (one for one in runs if one["kind"] == "train"):
            if run["state"] in ("failed", "cancelled"):
                raise SystemExit(f"the training is {run['state']}: {run['error']}")
    page.wait_for_timeout(2000)
    keep(page, out, "progress")
    while run["state"] != "done":
        time.sleep(1)
        run = client.ask("GET", f"/runs/{run['id']}")["run"]
    return str(run["id"])


def label(page: Page, client: AppClient, out: Path) -> None:
    """The label screen on the image whose proposals are surest, some of them accepted."""
    todo = client.pages("/projects/1/images", "images", status="proposed")
    surest = {}
    for image in todo:
        scores = [box["score"] for box in client.ask("GET", f"/images/{image['id']}/boxes")["boxes"]]
        clear = [score for score in scores if score >= 0.5]
        surest[image["id"]] = float(np.mean(clear)) * min(len(clear), 4) if clear else 0.0
    page.goto(f"{client.address}/#/p/1/label/{max(surest, key=lambda image: surest[image])}")
    page.locator("box-editor img[src]").wait_for()
    page.wait_for_timeout(1500)
    page.get_by_test_id("min-score").fill("0.5")
    page.locator("box-editor").focus()
    page.keyboard.press("a")
    page.wait_for_timeout(1500)
    keep(page, out, "label")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "app")
    parser.add_argument("--steps", type=int, default=250)
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no chromium on this machine: apt-get install chromium")
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server, thread, client = serve(Path(folder))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=WINDOW, device_scale_factor=2, reduced_motion="reduce", locale="en-GB")
        run = train(page, client, asked.out, asked.steps)
        page.goto(f"{client.address}/#/p/1/results/run-{run}")
        page.get_by_test_id("model-summary").locator("dl").wait_for()
        page.wait_for_timeout(1000)
        keep(page, asked.out, "results")
        client.run(1, "detect")
        client.run(1, "order", strategy="entropy")
        label(page, client, asked.out)
        browser.close()
        server.should_exit = True
        thread.join(30)


if __name__ == "__main__":
    main()
