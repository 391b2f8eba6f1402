"""Every notebook runs from top to bottom, on images drawn here, and shows pictures; nothing is left in its file."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from simdetr.data.scenes import render_scenes

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 120


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, num_images=6, size=(128, 160), seed=3)
    return folder


def execute(path: Path, folder: Path, environment: dict[str, str]) -> NotebookNode:
    """Run a copy in a kernel of this very interpreter, with ``folder`` as its working directory."""
    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(ensure_native_kernel=True))
    client = NotebookClient(notebook, km=manager, timeout=TIMEOUT_S, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return notebook


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_file_holds_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("with_labels", [True, False])
def test_notebook_runs_on_given_images(path: Path, with_labels: bool, scenes: Path, tmp_path: Path) -> None:
    environment = {"SIMDETR_IMAGES": str(scenes), "TMPDIR": str(tmp_path)}
    if with_labels:
        environment["SIMDETR_LABELS"] = str(scenes / "instances.json")
    executed = execute(path, tmp_path, environment)
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 8
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "6 images" in text
    assert ("No labels given" in text) != with_labels


def test_kernel_is_this_interpreter() -> None:
    spec = KernelSpecManager(ensure_native_kernel=True).get_kernel_spec("python3")
    assert Path(spec.argv[0]).name.startswith("python")
    assert sys.executable
