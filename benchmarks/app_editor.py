"""How far the labelling page's boxes lag behind the pointer.

    python benchmarks/app_editor.py [--moves 200] [--boxes 0 50 300]

Serves a drawn photograph, puts boxes on it, and moves the pointer in a headless Chromium of the system: drawing a new
box, moving one, and pulling a handle. Measured in the page, from when a `pointermove` was made to when the rectangle in
the document has its new edge, and to the next frame. A frame of 60 Hz has 16.7 ms. Needs chromium and the dev extra.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image as Pictures
from playwright.sync_api import Page, sync_playwright
from sqlmodel import Session

from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings
from simdetr.app.tables import Box, BoxClass, BoxSource, BoxStatus

WIDTH, HEIGHT = 1600, 1200
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


def serve(folder: Path, boxes: int) -> tuple[uvicorn.Server, threading.Thread, str]:
    """An app over one photograph with so many proposals."""
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (HEIGHT // 20, WIDTH // 20, 3), np.uint8)
    Pictures.fromarray(small).resize((WIDTH, HEIGHT)).save(photos / "photo.jpg")
    app = create_app(AppSettings(images=photos, out=folder / "out", port=0))
    app.state.desk.wait_for_index()
    with Session(app.state.desk.engine) as session:
        kind = BoxClass(project_id=1, name="thing")
        session.add(kind)
        session.flush()
        for _ in range(boxes):
            x, y = rng.uniform(0, WIDTH - 120), rng.uniform(0, HEIGHT - 120)
            place = {"x0": x, "y0": y, "x1": x + rng.uniform(20, 120), "y1": y + rng.uniform(20, 120)}
            status = {"score": 0.9, "status": BoxStatus.PROPOSED, "source": BoxSource.DETECTOR}
            session.add(Box(image_id=1, class_id=kind.id, **place, **status))
        session.commit()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/#/p/1/label/1"


def drag(page: Page, start: tuple[float, float], end: tuple[float, float], moves: int) -> list[str]:
    """Drag in so many moves, and say how long each took."""
    page.evaluate("() => { window.lags = []; window.frames = []; }")
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=moves)
    page.mouse.up()
    page.wait_for_timeout(300)
    found = []
    for name in ("lags", "frames"):
        times = page.evaluate(f"() => window.{name}")
        found.append(f"{statistics.median(times):6.2f} {np.percentile(times, 95):6.2f} {max(times):6.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=200)
    parser.add_argument("--boxes", type=int, nargs="+", default=[0, 50, 300])
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no chromium on this machine: apt-get install chromium")
    print("boxes  drag    to the box's edge, ms: median 95 % max     to the next frame: median 95 % max")
    for boxes in asked.boxes:
        with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
            server, thread, address = serve(Path(folder), boxes)
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(address)
            page.locator("box-editor img[src]").wait_for()
            page.wait_for_timeout(500)
            page.evaluate(LISTEN)
            rows = [
                ("draw", drag(page, (300, 200), (600, 500), asked.moves)),
                ("move", drag(page, (450, 350), (500, 400), asked.moves)),
                ("pull", drag(page, (650, 550), (700, 600), asked.moves)),
            ]
            for name, (edge, frame) in rows:
                print(f"{boxes:5d}  {name:5s} {edge:>38s} {frame:>38s}")
            browser.close()
            server.should_exit = True
            thread.join(30)


if __name__ == "__main__":
    main()
