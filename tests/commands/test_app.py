"""The command `label`: it names the extra that it needs, and loads no torch to list and show images."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_TORCH = """
import sys
from pathlib import Path
import simdetr.commands.main, simdetr.commands.app
from fastapi.testclient import TestClient
from simdetr.app import project_routes
from simdetr.app.server import create_app
from simdetr.app.settings import AppSettings
from simdetr.data import machine
machine.may_have_gpu = project_routes.may_have_gpu = lambda: False
app = create_app(AppSettings(images=Path(sys.argv[1]), out=Path(sys.argv[2])))
with TestClient(app, base_url="http://127.0.0.1") as client:
    app.state.desk.wait_for_index()
    for path in ("system", "projects", "projects/1/images", "projects/1/queue", "projects/1/runs", "projects/1/models",
                 "projects/1/estimate", "projects/1/clusters", "formats", "augmentations", "images/1/file",
                 "images/1/thumbnail"):
        answer = client.get(f"/api/{path}")
        assert answer.status_code == 200, (path, answer.text)
    kind = client.post("/api/projects/1/classes", json={"name": "thing"}).json()["id"]
    sheet = client.post("/api/projects/1/next", json={"holder": "me"}).json()
    body = {"version": sheet["version"], "boxes": [{"class_id": kind, "xyxy": [1, 1, 9, 9]}], "inspected": True}
    assert client.put("/api/images/1/boxes", json=body).json()["image"]["counts"]["manual"] == 1
assert "torch" not in sys.modules
"""


def test_labelling_needs_no_torch_in_the_server(own_scenes, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(own_scenes / "images"), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("module", ["fastapi", "sqlmodel"])
def test_without_the_extra_the_app_names_it_and_nothing_else_needs_it(module, tmp_path):
    code = f"import sys; sys.modules[{module!r}] = None; import simdetr.commands.app as commands\n"
    code += f"commands.label({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ImportError: label: {module} is not installed; `pip install 'simdetr[app]'` brings it" in ended.stderr
