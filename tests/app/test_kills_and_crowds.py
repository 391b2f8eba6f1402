"""Several people save at once, and the server is killed while they do: every edit that was answered is there, once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPException
from urllib.error import URLError

import pytest

from simdetr.app.client import AnswerError, AppClient


class Server:
    """The command `simdetr label` over a folder, started again after every kill."""

    def __init__(self, images, out, *more):
        self.command = [sys.executable, "-m", "simdetr", "label", "--images", str(images), "--out", str(out)]
        self.command += ["--port", "0", "--no_browser", "--device", "cpu", "--no_propose", *more]
        self.log = out.parent / "server.log"
        self.process = None

    def start(self):
        place = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as file:
            environment = os.environ | {"COLUMNS": "300"}
            self.process = subprocess.Popen(self.command, stdout=file, stderr=file, env=environment)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            said = self.log.read_bytes()[place:].decode(errors="replace")
            if "the page is at http://" in said:
                return "http://" + said.partition("the page is at http://")[2].split("/")[0]
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(own_scenes, tmp_path, small_detector):
    server = Server(own_scenes / "images", tmp_path / "out", "--run", str(small_detector))
    yield server
    server.kill()


class Person:
    """Adds boxes to an image beside those that are there; each has a left edge of its own."""

    def __init__(self, image, kind, first):
        self.image, self.kind, self.number = image, kind, first
        self.answered, self.unsure, self.stale = [], [], 0

    def draw(self, app):
        self.number += 1
        self.unsure.append(self.number)
        while True:
            sheet = app.ask("GET", f"/images/{self.image}/boxes")
            boxes = [{name: box[name] for name in ("id", "class_id", "xyxy")} for box in sheet["boxes"]]
            boxes.append({"class_id": self.kind, "xyxy": [self.number / 100, 1, 40, 40]})
            try:
                app.ask("PUT", f"/images/{self.image}/boxes", {"version": sheet["version"], "boxes": boxes})
                break
            except AnswerError as error:
                assert error.status == 409, error  # somebody was there first
                self.stale += 1
        self.answered.append(self.unsure.pop())

    def draw_until_killed(self, address):
        app = AppClient(address, timeout_s=30)
        try:
            while True:
                self.draw(app)
        except (URLError, OSError, HTTPException):
            return


def edges(app, image):
    """How often each left edge is on an image, the version, and the number of saves in its history."""
    sheet = app.ask("GET", f"/images/{image}/boxes")
    events = app.pages(f"/images/{image}/history", "events", limit=500)
    return Counter(round(box["xyxy"][0] * 100) for box in sheet["boxes"]), sheet["version"], len(events)


def test_people_who_save_at_once_lose_and_double_nothing(server):
    app = AppClient(server.start())
    kind = app.ask("POST", "/projects/1/classes", {"name": "thing"})["id"]
    people = [Person(1 + number % 2, kind, 100 * number) for number in range(4)]  # two on an image
    threads = [threading.Thread(target=lambda one=one: [one.draw(app) for _ in range(15)]) for one in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(one.stale for one in people) > 0  # else they did not meet
    for image in (1, 2):
        drawn = Counter(edge for one in people if one.image == image for edge in one.answered)
        there, version, saves = edges(app, image)
        assert there == drawn and len(drawn) == 30
        assert version == saves == 30


@pytest.mark.slow
def test_kills_lose_no_answered_edit_and_the_run_goes_on(server):
    rng = random.Random(0)
    app = AppClient(server.start())
    kind = app.ask("POST", "/projects/1/classes", {"name": "thing"})["id"]
    run = app.ask("POST", "/projects/1/runs", {"kind": "detect", "parameters": {"image_ids": [3, 4, 5, 6]}})["id"]
    people = [Person(image, kind, 100 * image) for image in (1, 2)]
    for _ in range(4):
        threads = [threading.Thread(target=one.draw_until_killed, args=(app.address,)) for one in people]
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.1, 2.5))
        server.kill()
        for thread in threads:
            thread.join(60)
        app = AppClient(server.start())
        for one in people:
            there, version, saves = edges(app, one.image)
            kept = [edge for edge in one.unsure if edge in there]  # saved, and the answer was not heard
            assert there == Counter(one.answered + kept)
            assert version == saves == len(one.answered) + len(kept)
            one.answered, one.unsure = one.answered + kept, []
        if app.ask("GET", f"/runs/{run}")["run"]["state"] == "failed":
            app.ask("POST", f"/runs/{run}/resume")
    assert all(len(one.answered) > 4 for one in people)
    until = time.monotonic() + 120
    while (state := app.ask("GET", f"/runs/{run}")["run"]["state"]) != "done" and time.monotonic() < until:
        time.sleep(0.2)
    assert state == "done"
