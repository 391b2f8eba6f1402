"""The client speaks to an app over a real port."""

from __future__ import annotations

import threading
import time

import pytest
import uvicorn

from simdetr.app.client import AnswerError, AppClient
from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings


@pytest.fixture
def client(own_scenes, tmp_path):
    settings = AppSettings(images=own_scenes / "images", out=tmp_path / "out", token="t" * 20, propose=False)
    app = create_app(settings)
    app.state.desk.wait_for_index()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield AppClient(f"http://127.0.0.1:{port}", token="t" * 20, author="김")
    server.should_exit = True
    thread.join()


def test_asks_reads_pages_and_says_what_was_refused(client):
    made = client.ask("POST", "/projects/1/classes", {"name": "개"})
    assert client.ask("GET", "/projects/1/classes")["classes"] == [made]
    images = client.pages("/projects/1/images", "images", order="name", limit=4)
    assert len(images) == 6
    body = {"version": 0, "boxes": [{"class_id": made["id"], "xyxy": [0, 0, 9, 9]}]}
    assert client.ask("PUT", f"/images/{images[0]['id']}/boxes", body)["boxes"][0]["author"] == "김"
    assert client.ask("GET", f"/images/{images[0]['id']}/thumbnail", size=64)[:2] == b"\xff\xd8"
    with pytest.raises(AnswerError, match="409: there is a class") as error:
        client.ask("POST", "/projects/1/classes", {"name": "개"})
    assert error.value.status == 409
    with pytest.raises(AnswerError, match="no detector"):
        client.run(1, "detect")


def test_an_address_without_its_kind_is_refused():
    with pytest.raises(ValueError, match="http://127"):
        AppClient("127.0.0.1:8000")
