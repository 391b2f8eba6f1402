"""A server over drawn photographs, and a Chromium of the system that must not complain nor ask any other host.

Without Chromium these tests are skipped with a reason; on CI they fail instead.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import uvicorn
from sqlmodel import Session

from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings
from simdetr.app.tables import Box, BoxSource, BoxStatus, Image, ImageStatus
from tests.app.browser.photos import PHOTO_WH, draw_photos

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ON_CI = os.environ.get("CI") == "true"
START_S = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = "no chromium on this machine; `apt-get install chromium` runs the tests of the page"
    if CHROMIUM is None and not ON_CI:
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict[str, object]:
    assert CHROMIUM is not None, "CI=true needs chromium: apt-get install chromium fonts-liberation"
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    return {"executable_path": CHROMIUM, "headless": True, "args": quiet}


@pytest.fixture
def browser_context_args() -> dict[str, object]:
    return {"viewport": {"width": 1280, "height": 800}, "accept_downloads": True, "reduced_motion": "reduce"}


@dataclass
class Site:
    """A server, and what a test asks of it beside the page.

    Attributes:
        url: where it is.
        app: what it serves.
    """

    url: str
    app: object
    project: int = 1

    def ask(self, method: str, path: str, body: object = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/api{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def images(self) -> list[dict]:
        return self.ask("GET", f"/projects/{self.project}/images?order=name&limit=100")["images"]

    def boxes(self, image: int, *, rejected: bool = False) -> list[dict]:
        return self.ask("GET", f"/images/{image}/boxes?rejected={str(rejected).lower()}")["boxes"]

    def add_class(self, name: str) -> int:
        return self.ask("POST", f"/projects/{self.project}/classes", {"name": name})["id"]

    def propose(
        self,
        image: int,
        class_id: int,
        boxes: list[tuple[list[float], float]],
        source: BoxSource = BoxSource.DETECTOR,
    ) -> None:
        """Put proposals on an image, as a run would."""
        with Session(self.app.state.desk.engine) as session:
            for (x0, y0, x1, y1), score in boxes:
                session.add(
                    Box(
                        image_id=image,
                        class_id=class_id,
                        x0=x0,
                        y0=y0,
                        x1=x1,
                        y1=y1,
                        score=score,
                        status=BoxStatus.PROPOSED,
                        source=source,
                    )
                )
            found = session.get(Image, image)
            assert found is not None
            found.status = ImageStatus.PROPOSED
            found.width, found.height = PHOTO_WH
            found.version += 1
            session.commit()

    def screen(self, name: str, argument: object = "") -> str:
        return f"{self.url}/#/p/{self.project}/{name}" + (f"/{argument}" if argument else "")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Serve so many drawn photographs; further keywords are of the app's settings."""
    running = []

    def start(photos: int = 2, **settings: object) -> Site:
        folder = tmp_path / "photos"
        if photos:
            draw_photos(folder, photos)
            settings.setdefault("images", folder)
        settings.setdefault("propose", False)
        app = create_app(AppSettings(out=tmp_path / "out", port=0, **settings))
        app.state.desk.wait_for_index()
        server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + START_S
        while not server.started and time.monotonic() < until:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        site = Site(f"http://127.0.0.1:{port}", app)
        if not photos and "images" not in settings:
            site.project = site.ask("POST", "/projects", {"name": "empty"})["id"]
        return site

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)


@dataclass
class Watch:
    """What the browser complained of; ``expected`` are parts of complaints that the test provokes."""

    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def left(self) -> list[str]:
        return [line for line in self.complaints if not any(part in line for part in self.expected)]


@pytest.fixture(autouse=True)
def watch(context) -> Iterator[Watch]:
    """Fail a test in which the page logs an error, throws, or asks another host for anything."""
    seen = Watch()

    def asked(request) -> None:
        address = urlsplit(request.url)
        if address.scheme in ("http", "https", "ws") and address.hostname != "127.0.0.1":
            seen.complaints.append(f"asked another host: {request.url}")

    def logged(message) -> None:
        if message.type in ("error", "warning"):
            seen.complaints.append(f"console: {message.text}")

    context.on("request", asked)
    context.on("console", logged)
    context.on("weberror", lambda error: seen.complaints.append(f"page error: {error.error}"))
    context.set_default_timeout(15_000)
    yield seen
    assert seen.left() == []
