"""The labelling app in a process of its own over drawn scenes, for the benchmarks of it; and where their results go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environment import RESULTS, environment, write_result
from simdetr.data.scenes import render_scenes

NAME = "labelling_app"
SIZE_HW = (480, 640)
_START_S, _ANSWER_S = 120.0, 60.0
_IDLE_S = 3.0  # the server ends a connection that says nothing for five seconds


class Site:
    """A server that is running, and one connection to it; ``again`` gives a thread a connection of its own.

    Args:
        address: Of the server, such as ``127.0.0.1:8000``.
        process: The server.
    """

    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self.address, self.process = address, process
        self._connection = HTTPConnection(address, timeout=_ANSWER_S)
        self._asked = time.monotonic()

    def again(self) -> Site:
        """Another connection to the same server."""
        return Site(self.address, self.process)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer; an OSError or HTTPException where there is none."""
        if time.monotonic() - self._asked > _IDLE_S:
            self._connection.close()  # the next request makes a new one
        self._asked = time.monotonic()
        data = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, f"/api{path}", data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            content = answer.read()
        except BaseException:
            self._connection.close()
            raise
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if content and is_json else content

    def get(self, path: str) -> Any:
        """The answer to a request that has to succeed."""
        return self.must("GET", path)

    def must(self, method: str, path: str, body: Any = None) -> Any:
        """The same of any method."""
        status, answer = self.ask(method, path, body)
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {answer}")
        return answer

    def worker(self) -> psutil.Process | None:
        """The process that computes, if there is one."""
        try:
            found = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return None
        return found[0] if found else None

    def memory_mb(self) -> float:
        """Resident memory of the server."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


def start(images: Path, out: Path, *more: str) -> Site:
    """Start ``simdetr label`` and wait until it answers and has read its images in."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "server.log"
    command = [sys.executable, "-m", "simdetr", "label", "--images", str(images), "--out", str(out), "--port", "0"]
    with log.open("ab") as file:
        place = file.tell()
        process = subprocess.Popen([*command, "--no_browser", *more], stdout=file, stderr=file, env=_wide())
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        with log.open("rb") as file:
            file.seek(place)
            said = file.read().decode(errors="replace")
        if "the page is at http://" in said:
            return Site(said.partition("the page is at http://")[2].split("/")[0], process)
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"the app did not start; see {log}")


def _wide() -> dict[str, str]:
    return os.environ | {"COLUMNS": "300"}  # so that no line of the log is broken


def stop(site: Site) -> None:
    """End a server in order, or after a while anyhow."""
    site.process.send_signal(signal.SIGINT)
    try:
        site.process.wait(30)
    except subprocess.TimeoutExpired:
        site.process.kill()
        site.process.wait()


@contextmanager
def served(images: Path, out: Path, *more: str) -> Iterator[Site]:
    """A server while the block runs."""
    site = start(images, out, *more)
    try:
        yield site
    finally:
        stop(site)


def scenes(folder: Path, count: int) -> Path:
    """Drawn scenes of 640 x 480 px, and the folder of their images; the labels are in ``instances.json`` beside it."""
    render_scenes(folder, count, SIZE_HW)
    return folder / "images"


def wait_until_read(site: Site, images: int) -> float:
    """Seconds until all images are in the database."""
    start_s = time.perf_counter()
    while (project := site.get("/projects/1"))["images"] < images or project["indexing"]:
        time.sleep(0.1)
    return time.perf_counter() - start_s


def begin_training(site: Site, images: Sequence[int], steps: int = 100_000, **parameters: Any) -> int:
    """Inspect images with a box each where nobody has, and train on them from random weights; the number of the run.

    It returns once steps are done.
    """
    classes = site.get("/projects/1/classes")["classes"]
    kind = classes[0]["id"] if classes else site.must("POST", "/projects/1/classes", {"name": "thing"})["id"]
    for image in images:
        sheet = site.get(f"/images/{image}/boxes")
        if sheet["image"]["status"] != "inspected":
            body = {"version": sheet["version"], "boxes": [{"class_id": kind, "xyxy": [50, 50, 250, 200]}]}
            site.must("PUT", f"/images/{image}/boxes", body | {"inspected": True})
    asked = {"init": None, "max_steps": steps, "validate_on": 0.0, **parameters}
    run = site.must("POST", "/projects/1/runs", {"kind": "train", "parameters": asked})["id"]
    wait_for_steps(site, run)
    return int(run)


def wait_for_steps(site: Site, run: int, seconds: float = 240.0) -> int:
    """Wait until a training tells of a step; which one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        news = site.get(f"/runs/{run}")
        steps = [row["step"] for row in news["metrics"] if "step" in row]
        if steps:
            return int(steps[-1])
        if news["run"]["state"] in ("failed", "cancelled", "done"):
            raise RuntimeError(f"the training is {news['run']['state']}: {news['run']['error']}")
        time.sleep(0.2)
    raise RuntimeError("the training did not begin")


def load() -> float:
    """Processes that want a core, over the last minute: other work on the machine disturbs what is measured."""
    return round(os.getloadavg()[0], 2)


def keep(part: str, found: dict[str, Any], load_at_start: float) -> None:
    """Put the result of a part into ``results/labelling_app.json``, with what it was measured on."""
    path = RESULTS / f"{NAME}.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    measured = environment(("torch", "fastapi", "sqlalchemy", "uvicorn"))
    parts[part] = found | {"environment": measured | {"load_at_start": load_at_start, "load_at_end": load()}}
    print(json.dumps({part: found}, indent=2))
    write_result(NAME, {"parts": dict(sorted(parts.items()))})
