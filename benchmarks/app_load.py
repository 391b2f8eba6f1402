"""The labelling app under load: a long queue, several people at once, a training beside them, and kills.

Every part starts `simdetr label` in a process of its own on drawn scenes of 640 x 480 px, and speaks to it on
127.0.0.1.

    queue   so many images, of which the most are links: seconds of a page and memory of the server
    edits   people who save boxes at a fixed rate beside a training: lost and doubled edits, seconds of an answer
    detect  one image, by the detector of the recipe for a machine without a GPU, in a worker that holds it
    kills   the server, the worker or both are killed (SIGKILL) at random moments of labelling and training

python -m benchmarks.app_load [--parts queue edits detect kills]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.app_site import Site, begin_training, keep, load, scenes, served, start, stop, wait_until_read

MOST_BOXES = 12
"""Boxes of an image that is edited; the oldest gives way to a new one."""
_MEMORY = "import torch, psutil; print(psutil.Process().memory_info().rss)"
_TRAINED_ON = 8


# ----------------------------------------------------------------------------------------------------------------------
# People


@dataclass
class Labeller:
    """Somebody who draws a box after the other on an image of their own, and knows what was answered.

    Attributes:
        image: the image.
        kind: class of the boxes.
        acknowledged: left edges of the boxes whose saving was answered, in order.
        unsure: left edge of the one that was sent and not answered.
        boxes: the boxes as the server last said.
        version: of the image.
        seconds: of the answers, from when the edit was due.
        refused: answers other than success.
        drawn: how many boxes were sent.
        before: how many times the image had been saved.
    """

    image: int
    kind: int
    acknowledged: list[int] = field(default_factory=list)
    unsure: int | None = None
    boxes: list[dict[str, Any]] = field(default_factory=list)
    version: int = 0
    seconds: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    drawn: int = 0
    before: int = 0

    def look(self, site: Site) -> None:
        """Read the image."""
        sheet = site.get(f"/images/{self.image}/boxes")
        self.boxes, self.version = sheet["boxes"], sheet["version"]

    def draw(self, site: Site) -> None:
        """Save one more box; every one has a place of its own, so that it can be told from the others."""
        self.drawn += 1
        left = self.drawn
        kept = [{name: box[name] for name in ("id", "class_id", "xyxy")} for box in self.boxes[-(MOST_BOXES - 1) :]]
        self.unsure = left
        new = {"class_id": self.kind, "xyxy": [left / 100, 10, 600, 400]}
        status, sheet = site.ask("PUT", f"/images/{self.image}/boxes", {"version": self.version, "boxes": [*kept, new]})
        if status < 300:
            self.acknowledged.append(left)
            self.boxes, self.version = sheet["boxes"], sheet["version"]
        else:
            self.refused.append(status)
            self.look(site)
        self.unsure = None

    def work(self, site: Site, rate: float, seconds: float) -> None:
        """Draw at a rate for so long; late edits follow at once."""
        own, begin = site.again(), time.perf_counter()
        for number in range(round(rate * seconds)):
            due = begin + number / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            self.draw(own)
            self.seconds.append(time.perf_counter() - due)

    def faults(self, site: Site) -> tuple[int, int]:
        """How many of the answered edits are lost, and how many edits there are too many.

        The history of the image has one event per edit, and the boxes that are left are the last that were drawn. An
        edit that was sent and not answered may be there or not.
        """
        self.look(site)
        there = [round(box["xyxy"][0] * 100) for box in self.boxes]
        if self.unsure in there:
            self.acknowledged.append(self.unsure)
        self.unsure = None
        saves = saves_of(site, self.image) - self.before
        lost = len(set(self.acknowledged[-MOST_BOXES:]) - set(there)) + max(0, len(self.acknowledged) - saves)
        return lost, len(there) - len(set(there)) + max(0, saves - len(self.acknowledged))


def saves_of(site: Site, image: int) -> int:
    """How many times an image was saved, by its history."""
    events, after = 0, ""
    while True:
        page = site.get(f"/images/{image}/history?limit=500{after}")
        events += sum(event["what"] == "save" for event in page["events"])
        if page["next"] is None:
            return events
        after = f"&after={page['next']}"


def labellers(site: Site, images: list[int]) -> list[Labeller]:
    """People with an image each, opened."""
    classes = site.get("/projects/1/classes")["classes"]
    kind = classes[0]["id"] if classes else site.must("POST", "/projects/1/classes", {"name": "thing"})["id"]
    people = [Labeller(image, kind, before=saves_of(site, image)) for image in images]
    for person in people:
        site.must("POST", f"/images/{person.image}/open", {"holder": f"person-{person.image}"})
        person.look(site)
    return people


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def queue(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """A long queue: how long pages take and what the server holds."""
    photos = scenes(folder / "scenes", 2)
    first = next(photos.iterdir())
    for number in range(asked.images - 2):
        part = photos / f"{number // 1000:03d}"
        kept = part / f"{number:06d}{first.suffix}"
        if number % 1000:
            os.link(part / f"{number // 1000 * 1000:06d}{first.suffix}", kept)
        else:
            part.mkdir()
            shutil.copy(first, kept)
    bare = int(subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, check=True, text=True).stdout) / 1e6
    begun = time.perf_counter()
    site = start(photos, folder / "out")
    try:
        start_s = time.perf_counter() - begun
        read_s = wait_until_read(site, asked.images)
        seconds: dict[str, list[float]] = {}
        requests: dict[str, Callable[[], Any]] = {
            "first page of the list": lambda: site.get("/projects/1/images?limit=50"),
            "a page in the middle": lambda: site.get(f"/projects/1/images?limit=50&after=0.0:{asked.images // 2}"),
            "to be done, by priority": lambda: site.get(
                "/projects/1/images?status=new&status=proposed&status=in_inspection&limit=40"
            ),
            "by name": lambda: site.get("/projects/1/images?order=name&limit=50"),
            "name contains, found at the end": lambda: site.get(
                f"/projects/1/images?search={asked.images - 5:06d}&limit=50"
            ),
            "queue": lambda: site.get("/projects/1/queue"),
            "project": lambda: site.get("/projects/1"),
            "next image": lambda: site.must("POST", "/projects/1/next", {"holder": "me"}),
        }
        for name, ask in requests.items():
            for _ in range(asked.repeats):
                begun = time.perf_counter()
                ask()
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
        after = ""
        for _ in range(100):  # somebody scrolls
            page = site.get(f"/projects/1/images?limit=50{after}")
            after = f"&after={page['next']}"
        memory = site.memory_mb()
    finally:
        stop(site)
    return {
        "images": asked.images,
        "server_start_s": round(start_s, 1),
        "read_in_s": round(read_s, 1),
        "median_ms": {name: round(1000 * statistics.median(times), 1) for name, times in seconds.items()},
        "slowest_ms": {name: round(1000 * max(times), 1) for name, times in seconds.items()},
        "server_mb": round(memory),
        "bare_torch_mb": round(bare),
    }


def edits(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """People who save at a fixed rate, alone and beside a training."""
    photos = scenes(folder / "scenes", _TRAINED_ON + asked.people)
    found: dict[str, Any] = {"people": asked.people, "edits_per_second": asked.rate, "seconds": asked.seconds}
    with served(photos, folder / "out") as site:
        wait_until_read(site, _TRAINED_ON + asked.people)
        for name in ("alone", "training"):
            run = begin_training(site, range(1, _TRAINED_ON + 1)) if name == "training" else None
            images = range(_TRAINED_ON + 1, _TRAINED_ON + asked.people + 1)
            found[name] = _edited(site, list(images), asked.rate, asked.seconds)
            if run is not None:
                news = site.get(f"/runs/{run}")
                found[name]["training"] = {"state": news["run"]["state"], "steps": news["run"]["done"]}
                site.must("POST", f"/runs/{run}/cancel")
            for image in images:
                sheet = site.get(f"/images/{image}/boxes")
                site.must("PUT", f"/images/{image}/boxes", {"version": sheet["version"], "boxes": []})
    return found


def _edited(site: Site, images: list[int], rate: float, seconds: float) -> dict[str, Any]:
    people = labellers(site, images)
    threads = [threading.Thread(target=person.work, args=(site, rate, seconds)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [1000 * one for person in people for one in person.seconds]
    faults = [person.faults(site) for person in people]
    return {
        "edits": len(times),
        "answered": sum(len(person.acknowledged) for person in people),
        "refused": sum(len(person.refused) for person in people),
        "lost": sum(lost for lost, _ in faults),
        "doubled": sum(doubled for _, doubled in faults),
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(float(np.percentile(times, 95)), 1),
        "slowest_ms": round(max(times), 1),
    }


def detect(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """One image by the detector of the recipe, from the request to its proposals, in a worker that holds it."""
    photos = scenes(folder / "scenes", 2 * _TRAINED_ON)
    with served(photos, folder / "out") as site:
        wait_until_read(site, 2 * _TRAINED_ON)
        run = begin_training(site, range(1, _TRAINED_ON + 1), steps=2)
        ended(site, run, 240.0)
        seconds = []
        for number in range(1 + asked.repeats):
            begun = time.perf_counter()
            image = _TRAINED_ON + 1 + number % _TRAINED_ON
            found = site.must("POST", f"/images/{image}/detect", {})
            ended(site, found["id"], 60.0)
            seconds.append(time.perf_counter() - begun)
        facts = site.get(f"/projects/1/models/run-{run}")
    return {
        "first_s": round(seconds[0], 2),
        "median_s": round(statistics.median(seconds[1:]), 2),
        "slowest_s": round(max(seconds[1:]), 2),
        "image_size_hw": facts["image_size"],
        "parameters": facts["parameters"],
    }


def ended(site: Site, run: int, seconds: float) -> dict[str, Any]:
    """A run once it is done; a RuntimeError where it is not done in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found: dict[str, Any] = site.get(f"/runs/{run}?since=1000000000")["run"]
        if found["state"] == "done":
            return found
        if found["state"] in ("failed", "cancelled"):
            break
        time.sleep(0.02)
    raise RuntimeError(f"run {run} is {found['state']}: {found['error']}")


def kills(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Kill the server, the worker or both while somebody labels and a training runs; look at what is there then."""
    photos = scenes(folder / "scenes", _TRAINED_ON + asked.people)
    out, rng = folder / "out", random.Random(asked.seed)
    site = start(photos, out)
    wait_until_read(site, _TRAINED_ON + asked.people)
    parameters = {"steps": asked.steps, "options": ["--self_training.checkpoint_every_steps=5"]}
    run = begin_training(site, range(1, _TRAINED_ON + 1), **parameters)
    people = labellers(site, list(range(_TRAINED_ON + 1, _TRAINED_ON + asked.people + 1)))
    found: dict[str, Any] = {"kills": {}, "resumed": 0, "lost": 0, "doubled": 0, "left_alive": 0}
    for _ in range(asked.kills):
        what = rng.choice(("server", "worker", "both", "server while it starts"))
        found["kills"][what] = found["kills"].get(what, 0) + 1
        threads = [threading.Thread(target=_until_killed, args=(person, site, asked.rate)) for person in people]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.0, asked.longest))
        worker = site.worker()
        if what != "worker":
            site.process.kill()
        if what in ("worker", "both") and worker is not None:
            worker.kill()
        if what == "worker":
            time.sleep(1.0)
            site.process.kill()  # a new server for the next one, and what was saved meanwhile is looked at too
        site.process.wait()
        for thread in threads:
            thread.join()
        if worker is not None and not _is_gone(worker):
            found["left_alive"] += 1
            worker.kill()
        if what == "server while it starts":
            _killed_early(photos, out, rng.uniform(0.0, 4.0))
        site = start(photos, out)
        for person in people:
            lost, doubled = person.faults(site)
            found["lost"] += lost
            found["doubled"] += doubled
        if site.get(f"/runs/{run}")["run"]["state"] == "failed":
            site.must("POST", f"/runs/{run}/resume")
            found["resumed"] += 1
    try:
        last = ended(site, run, 600.0)
        told = [row["step"] for row in site.get(f"/runs/{run}")["metrics"] if "step" in row]
        found |= {
            "edits": sum(len(person.acknowledged) for person in people),
            "run": last["state"],
            "steps": last["done"],
            "steps_done_again": sum(max(0, before - after + 1) for before, after in pairwise(told)),
        }
    finally:
        stop(site)
    return found


def _until_killed(person: Labeller, site: Site, rate: float) -> None:
    try:
        person.work(site, rate, 3600.0)
    except (OSError, HTTPException):
        return


def _is_gone(process: psutil.Process) -> bool:
    try:
        process.wait(10.0)
    except psutil.TimeoutExpired:
        return False
    return True


def _killed_early(photos: Path, out: Path, seconds: float) -> None:
    """Kill a server so long after its start."""
    command = [sys.executable, "-m", "simdetr", "label", "--images", str(photos), "--out", str(out), "--port", "0"]
    process = subprocess.Popen([*command, "--no_browser"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "queue": queue,
    "edits": edits,
    "detect": detect,
    "kills": kills,
}


def main() -> None:
    """Measure and write ``results/labelling_app.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--images", type=int, default=100_000, help="in the queue")
    parser.add_argument("--repeats", type=int, default=9, help="of each request, of which medians are taken")
    parser.add_argument("--people", type=int, default=4)
    parser.add_argument("--rate", type=float, default=10.0, help="edits per second of each")
    parser.add_argument("--seconds", type=float, default=60.0, help="of editing")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=12.0, help="seconds until a kill, at most")
    parser.add_argument("--steps", type=int, default=100, help="of the training that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    asked = parser.parse_args()
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as folder:
            before = load()
            keep(part, PARTS[part](Path(folder), asked), before)


if __name__ == "__main__":
    main()
