"""A process beside the server answers; the server itself loads no torch, whatever it is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from simdetr.app.aside import Aside
from simdetr.app.refusals import Refusal
from tests.app import questions


@pytest.fixture
def aside(tmp_path):
    aside = Aside(tmp_path / "aside.log")
    yield aside
    aside.stop()


def test_a_function_is_called_in_a_process_of_its_own(aside, tmp_path):
    assert aside.pid is None
    assert aside.ask(questions.number_of_process) == aside.pid != os.getpid()
    assert aside.ask(questions.says_something) is None  # what is printed there is no answer
    (tmp_path / "it.bin").write_bytes(everything := bytes(range(256)))
    assert aside.ask(questions.content_of, tmp_path / "it.bin") == everything


def test_arguments_and_answers_arrive_as_the_types_that_functions_say(aside, tmp_path):
    parcel = questions.Parcel(bytes(range(256)), tmp_path / "a b\n.png", (3, 0.1))
    assert aside.ask(questions.sent_back, parcel) == [parcel]
    assert aside.ask(questions.sent_back, parcel, twice=True) == [parcel, parcel]


def test_refusals_come_as_they_are_and_other_errors_as_refusals(aside):
    with pytest.raises(Refusal, match="there is no file for image 日本") as refused:
        aside.ask(questions.refuses, 404)
    assert refused.value.status == 404
    with pytest.raises(Refusal) as refused:
        aside.ask(questions.fails)
    assert (refused.value.status, refused.value.detail) == (409, "not this")
    assert "Traceback" in aside.log.read_text()
    assert aside.ask(questions.number_of_process) == aside.pid


def test_stopped_while_a_first_question_starts_it_leaves_no_process(aside, monkeypatch):
    start, stopping = aside._started, threading.Thread(target=aside.stop)

    def start_too_late():
        stopping.start()
        time.sleep(0.3)  # it has seen no process by now, and waits for the question
        return start()

    monkeypatch.setattr(aside, "_started", start_too_late)
    number = aside.ask(questions.number_of_process)
    stopping.join(20)
    assert not stopping.is_alive() and not psutil.pid_exists(number)


def test_it_is_started_again_after_it_was_killed_or_had_nothing_to_do(tmp_path):
    aside = Aside(tmp_path / "aside.log", idle_s=0.2)
    first = aside.ask(questions.number_of_process)
    psutil.Process(first).wait(20)
    second = aside.ask(questions.number_of_process)
    os.kill(second, signal.SIGTERM)
    assert aside.ask(questions.number_of_process) not in (first, second)
    with pytest.raises(Refusal, match="has ended"):
        aside.ask(questions.ends, 7)
    aside.stop()
    with pytest.raises(Refusal, match="stopped"):
        aside.ask(questions.number_of_process)


def test_it_ends_when_the_app_is_gone():
    command = [sys.executable, "-m", "simdetr.app.aside", "600"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


ASKED = """
import json, sys
from pathlib import Path
from fastapi.testclient import TestClient
from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings
from simdetr.app.tables import Run, RunKind, RunState
from simdetr.app.database import writing

images, out, detector, paths = sys.argv[1:]
app = create_app(AppSettings(images=Path(images), out=Path(out), run=Path(detector), device="cpu", propose=False))
with TestClient(app, base_url="http://127.0.0.1") as client:
    app.state.desk.wait_for_index()
    with writing(app.state.desk.engine) as session:
        session.add(Run(project_id=1, kind=RunKind.DETECT, state=RunState.DONE, parameters={"image_ids": []}))
    for path in json.loads(paths):
        method, _, address = path.partition(" ")
        answer = client.request(method, "/api" + address, json={} if method == "POST" else None)
        assert answer.status_code < 300, (path, answer.status_code, answer.text)
        assert "torch" not in sys.modules, path
"""


def test_the_server_loads_no_torch(own_scenes, small_detector, tmp_path):
    paths = [
        "GET /system",
        "GET /projects/1",
        "POST /projects/1/audit",
        "GET /projects/1/estimate",
        "GET /projects/1/models/start",
        "GET /projects/1/models/start/memory",
        "GET /projects/1/models/start/held_out",
        "GET /images/1/augmented?rotation=10",
        "GET /images/1/thumbnail",
        "GET /formats",
        "GET /augmentations",
    ]
    command = [sys.executable, "-c", ASKED, own_scenes / "images", tmp_path / "out", small_detector, json.dumps(paths)]
    subprocess.run(list(map(str, command)), check=True, timeout=120, cwd=Path(__file__).parents[2])
