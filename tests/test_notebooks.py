"""Every notebook runs from top to bottom, on images drawn here, and shows pictures; nothing is left in its file.

nbclient runs in a process of its own: the sockets to its kernel are closed late, which would be warnings here.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from simdetr.data.scenes import render_scenes

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EXPLORE, HEADS = NOTEBOOKS
EXECUTE = "from nbclient.cli import main; main()"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, num_images=6, size=(128, 160), seed=3)
    return folder


def execute(path: Path, folder: Path, **environment: str) -> NotebookNode:
    """Run a notebook with this very interpreter in ``folder``, where its temporary files go as well."""
    executed = folder / "executed.ipynb"
    own = {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1", "TMPDIR": str(folder)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIMDETR_")}
    command = [
        sys.executable,
        "-c",
        EXECUTE,
        str(path),
        f"--output={executed}",
        "--timeout=300",
        "--startup_timeout=300",
    ]
    finished = subprocess.run(command, cwd=folder, env=kept | own | environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return nbformat.read(executed, as_version=4)


def test_these_are_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_explore_proposals", "02_heads"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_file_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "no-labels"])
def test_proposals_of_given_images(with_labels, scenes, tmp_path):
    labels = {"SIMDETR_LABELS": str(scenes / "instances.json")} if with_labels else {}
    executed = execute(EXPLORE, tmp_path, SIMDETR_IMAGES=str(scenes), **labels)
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= (11 if with_labels else 10)
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert f"6 images in {scenes}" in text
    assert ("No labels given" in text) != with_labels


def test_heads_on_given_images(scenes, tmp_path):
    own = {"SIMDETR_IMAGES": str(scenes), "SIMDETR_LABELS": str(scenes / "instances.json"), "SIMDETR_STEPS": "2"}
    executed = execute(HEADS, tmp_path, **own)  # localisation on scenes of its own, with one class each
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 7
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "point_AP" in text and "MaxBoxAccV2" in text and f"6 images in {scenes}" in text
