"""An app over a folder of drawn scenes, and somebody who speaks to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from simdetr.app.desk import Desk
from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings


@dataclass
class Person:
    """Speaks to an app about its first project, and says what was answered."""

    client: TestClient
    desk: Desk
    settings: AppSettings

    def ask(self, method: str, path: str, body: Any = None, status: int = 200, **options: Any) -> Any:
        answer = self.client.request(method, f"/api{path}", json=body, **options)
        assert answer.status_code == status, answer.text
        if answer.headers.get("content-type") == "application/json" and answer.content:
            return answer.json()
        return answer.content

    def get(self, path: str, **query: Any) -> Any:
        return self.ask("GET", path, params=query)

    def make_class(self, name: str = "thing") -> int:
        return self.ask("POST", "/projects/1/classes", {"name": name}, 201)["id"]

    def images(self) -> list[dict[str, Any]]:
        return self.get("/projects/1/images", order="name", limit=500)["images"]

    def draw(self, image_id: int, *boxes: tuple[int, list[float]], inspected: bool = True) -> dict[str, Any]:
        """Draw boxes of classes on an image beside those that are there."""
        sheet = self.get(f"/images/{image_id}/boxes")
        sent = [{"id": b["id"], "class_id": b["class_id"], "xyxy": b["xyxy"]} for b in sheet["boxes"]]
        sent += [{"class_id": class_id, "xyxy": xyxy} for class_id, xyxy in boxes]
        body = {"version": sheet["version"], "boxes": sent, "inspected": inspected}
        return self.ask("PUT", f"/images/{image_id}/boxes", body)

    def wait(self, run_id: int, *states: str, seconds: float = 240) -> dict[str, Any]:
        """The run once it is in one of some states."""
        wanted = states or ("done", "failed", "cancelled")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run = self.get(f"/runs/{run_id}")["run"]
            if run["state"] in wanted:
                return run
            time.sleep(0.1)
        raise AssertionError(f"run {run_id} is {run}")

    def run(self, kind: str, **parameters: Any) -> dict[str, Any]:
        started = self.ask("POST", "/projects/1/runs", {"kind": kind, "parameters": parameters}, 201)
        return self.wait(started["id"])


@pytest.fixture
def serve(own_scenes: Path, tmp_path: Path) -> Iterator[Callable[..., Person]]:
    """Open an app over six scenes; again over the same folder as if it was started anew."""
    opened: list[TestClient] = []

    def start(**changes: Any) -> Person:
        close()
        chosen = {"images": own_scenes / "images", "out": tmp_path / "out", "propose": False, **changes}
        settings = AppSettings(**chosen)
        app = create_app(settings)
        client = TestClient(app, base_url="http://127.0.0.1", headers={"x-author": "ann"})
        client.__enter__()
        opened.append(client)
        desk: Desk = app.state.desk
        desk.wait_for_index()
        return Person(client, desk, settings)

    def close() -> None:
        while opened:
            opened.pop().__exit__(None, None, None)

    yield start
    close()


@pytest.fixture
def person(serve: Callable[..., Person]) -> Person:
    """Somebody before an app over six scenes."""
    return serve()


@pytest.fixture(scope="session")
def small_detector(tmp_path_factory: pytest.TempPathFactory, make_detector: Callable[..., Any]) -> Path:
    """The folder of a small detector with random weights and two classes, as a training leaves it."""
    from simdetr.exchange.weights import checkpoint_config, save_detector

    folder = tmp_path_factory.mktemp("detector") / "detector"
    detector = make_detector(2)
    config = checkpoint_config(detector, None)
    config["categories"] = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
    config["image_settings"] = {"short_side": 64, "max_side": 80}
    save_detector(detector, config, folder)
    return folder


@pytest.fixture
def truth_of(own_scenes: Path) -> Callable[[str], list[list[float]]]:
    """The boxes of a scene by its file's name, xyxy."""
    content = json.loads((own_scenes / "instances.json").read_text())
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}

    def boxes(name: str) -> list[list[float]]:
        found = [row["bbox"] for row in content["annotations"] if names[row["image_id"]] == Path(name).name]
        return [[x, y, x + w, y + h] for x, y, w, h in found]

    return boxes
