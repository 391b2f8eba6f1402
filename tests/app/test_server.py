"""The whole app: its document is true, whatever is sent; it starts, says where it is, and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from simdetr.app.server import address_of, serve
from simdetr.app.settings import AppSettings

OF_THE_FIRST = ("project_id", "image_id", "class_id", "box_id", "run_id")
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


@pytest.fixture
def schema(serve, small_detector):
    person = serve(run=small_detector, device="cpu")
    person.desk.runs._closing.set()  # runs are asked for, and none is done
    class_id = person.make_class()
    person.draw(1, (class_id, [0, 0, 20, 20]), (class_id, [5, 5, 30, 30]))
    person.ask("POST", "/projects/1/shots", {"box_id": 1}, 201)
    person.get("/projects/1/models/start")  # the process beside the server is there: it takes seconds to start
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", person.client.app, headers={"host": "127.0.0.1"})
    schema.person = person
    return schema


def cases_of(operation):
    """Requests that fit the document, and requests that do not."""
    return hypothesis.strategies.one_of([operation.as_strategy(generation_mode=mode) for mode in MODES])


def test_answers_are_as_the_document_says_whatever_is_sent(schema):
    """Each operation is asked some times with values that fit the document and some that do not."""
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 50
    deadline = time.monotonic() + 50
    tried, answered = set(), {}

    for operation in sorted(operations, key=lambda one: one.method == "delete"):
        if time.monotonic() > deadline:
            break

        @hypothesis.given(case=cases_of(operation))
        @hypothesis.settings(
            max_examples=8,
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def ask(case):
            for name, value in case.path_parameters.items():
                if name in OF_THE_FIRST and isinstance(value, int):
                    case.path_parameters[name] = 1
            if isinstance(case.body, dict) and "version" in case.body and isinstance(case.body["version"], int):
                case.body["version"] = schema.person.get("/images/1/boxes")["version"]
            answer = case.call_and_validate(checks=CHECKS, base_url="http://127.0.0.1")
            answered.setdefault(case.operation.label, set()).add(answer.status_code)

        ask()
        tried.add(operation.label)
    done = [label for label, codes in answered.items() if any(code < 300 for code in codes)]
    assert len(done) > len(operations) / 2, answered
    assert len(tried) == len(operations), f"only {len(tried)} of {len(operations)} in time"


def test_every_answer_has_a_shape(person):
    document = person.get("/openapi.json")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary") and operation.get("description"), (method, path)
            success = [code for code in operation["responses"] if code.startswith("2")]
            assert success, (method, path)


def test_the_address_is_one_that_a_browser_can_open():
    assert address_of(AppSettings(), 80) == "http://127.0.0.1:80/"
    assert address_of(AppSettings(host="::1"), 80) == "http://[::1]:80/"
    token = "x" * 20
    assert address_of(AppSettings(host="0.0.0.0", token=token), 80) == f"http://127.0.0.1:80/?token={token}"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(own_scenes, tmp_path, sent):
    command = [sys.executable, "-m", "simdetr", "label", "--images", str(own_scenes / "images")]
    command += ["--out", str(tmp_path / "out"), "--port", "0", "--no_browser"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    try:
        address = next(line for line in process.stderr if "the page is at" in line)
        place = address.partition("http://")[2].split()[0]
        with urlopen(f"http://{place}api/projects") as answer:
            assert len(json.load(answer)["projects"]) == 1
        with urlopen(f"http://{place}") as answer:
            assert b"<html" in answer.read()
        process.send_signal(sent)
        assert process.wait(30) in (0, 128 + sent, -sent)
        assert "error" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def test_a_port_that_is_taken_is_said_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = AppSettings(out=tmp_path / "out", port=port)
        # in a thread of its own: where tests of the page ran before, Playwright's event loop is this one's
        with ThreadPoolExecutor(1) as thread:
            serving = thread.submit(serve, settings, opens_browser=False)
            with pytest.raises(RuntimeError, match=f"127.0.0.1:{port} cannot be listened on; choose another"):
                serving.result()
