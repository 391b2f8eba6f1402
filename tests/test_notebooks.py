"""Every notebook runs from top to bottom, on images drawn here, and shows pictures; nothing is left in its file.

nbclient runs in a process of its own: the sockets to its kernel are closed late, which would be warnings here.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode

from simdetr.data.coco import write_coco
from simdetr.data.label_files import read_labels
from simdetr.data.scenes import render_scenes
from simdetr.labelling.candidates import REASONS

FOLDER = Path(__file__).parents[1] / "notebooks"
EXPLORE, HEADS = FOLDER / "01_explore_proposals.ipynb", FOLDER / "02_heads.ipynb"
COMPARE, FEW_LABELS = FOLDER / "03_compare_initialisations.ipynb", FOLDER / "04_few_labels.ipynb"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EXECUTE = "from nbclient.cli import main; main()"


class Shown(NamedTuple):
    """What the cells of a notebook have put out."""

    text: str
    pictures: int


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(path: Path, folder: Path, **environment: str | Path) -> Shown:
    """Run a notebook with this very interpreter in ``folder``, where its temporary files go as well."""
    executed = folder / "executed.ipynb"
    own = {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1", "TMPDIR": str(folder)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIMDETR_")}
    given = {name: str(value) for name, value in environment.items()}
    command = [
        sys.executable,
        "-c",
        EXECUTE,
        str(path),
        f"--output={executed}",
        "--timeout=300",
        "--startup_timeout=300",
    ]
    finished = subprocess.run(command, cwd=folder, env=kept | own | given, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    outputs = [output for cell in code_cells(nbformat.read(executed, as_version=4)) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return Shown(
        "".join(
            output.text if output.output_type == "stream" else output.get("data", {}).get("text/markdown", "")
            for output in outputs
        ),
        sum("image/png" in output.get("data", {}) for output in outputs),
    )


def test_each_notebook_is_run_here():
    assert [EXPLORE, HEADS, COMPARE, FEW_LABELS] == NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_file_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    render_scenes(folder, num_images=6, size=(128, 160), seed=3)
    return folder


@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "no-labels"])
def test_proposals_of_given_images(with_labels, scenes, tmp_path):
    labels = {"SIMDETR_LABELS": scenes / "instances.json"} if with_labels else {}
    shown = execute(EXPLORE, tmp_path, SIMDETR_IMAGES=scenes, **labels)
    assert shown.pictures >= (11 if with_labels else 10)
    assert f"6 images in {scenes}" in shown.text
    assert ("No labels given" in shown.text) != with_labels


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_classes")
    render_scenes(folder, num_images=12, size=(64, 96), seed=3, classes=("striped_disc", "speckled_box"))
    return folder


def test_heads_trained_and_finished_on_given_images(two_classes, tmp_path):
    path = two_classes / "instances.json"
    inputs = {"SIMDETR_IMAGES": two_classes, "SIMDETR_LABELS": path, "SIMDETR_STEPS": "2"}
    inputs |= {"SIMDETR_LOCALISATION_IMAGES": two_classes, "SIMDETR_LOCALISATION_LABELS": path}
    labels = read_labels(path)
    seen = [name for name in labels.image_ids if len(labels.of(name))]
    one_class = [name for name in seen if len(set(labels.of(name).classes.tolist())) == 1]
    assert 5 <= len(one_class) < len(seen)

    shown = execute(HEADS, tmp_path, **inputs)
    assert shown.pictures == 7
    held_out = labels.select(seen[4::5])
    assert f"landmarks: 2 steps on {len(seen) - len(held_out)} images" in shown.text
    assert f"{len(held_out.boxes_xyxy)} points on {len(held_out)} images" in shown.text
    classes_alone = np.array([[0, 0, 96, 64]], np.float32).tolist()
    assert f"boxes that training sees: {classes_alone}\n" in shown.text
    assert f"localisation: 2 steps on {len(one_class) - len(one_class[4::5])} images" in shown.text
    assert table(shown, f"{len(one_class[4::5])} images") == ["attention", "CAM", "centre"]

    runs = {name: next(tmp_path.glob(f"simdetr-*/{name}")) for name in ("landmarks", "cam")}
    shown = execute(
        HEADS, tmp_path, **inputs, SIMDETR_LANDMARK_RUN=runs["landmarks"], SIMDETR_LOCALISATION_RUN=runs["cam"]
    )
    assert shown.pictures == 6 and "steps on" not in shown.text
    assert f"{len(labels.boxes_xyxy)} points on {len(seen)} images" in shown.text
    assert "has no attention" in shown.text
    assert table(shown, f"{len(one_class)} images") == ["CAM", "centre"]


def test_arms_compared_on_given_images(two_classes, tmp_path):
    labels = two_classes / "instances.json"
    inputs = {"SIMDETR_IMAGES": two_classes, "SIMDETR_LABELS": labels, "SIMDETR_FRACTIONS": "0.5", "SIMDETR_SIZE": "96"}
    shown = execute(COMPARE, tmp_path, **inputs, SIMDETR_STEPS="2")
    assert shown.pictures == 9
    held_out = round(0.3 * 12)
    objects = len(read_labels(labels).select(read_labels(next(tmp_path.glob("*/labels/train.json"))).image_ids).classes)
    assert f"{12 - held_out} labelled images to learn from, {objects} objects" in shown.text
    assert "12 images mined" in shown.text and "only 12 images were mined" in shown.text
    covered = re.search(r"cover (\d+)% of (\d+) labelled objects \(IoU 0.5; those of another image (\d+)%", shown.text)
    assert covered is not None and int(covered[2]) == objects and int(covered[1]) > int(covered[3])
    probed = re.findall(r"^ *(\w+): accuracy .* 2 classes, (\d+) images to learn", shown.text, re.MULTILINE)
    assert objects > 20 and probed == [(arm, "20") for arm in ("random", "stage1", "stage2")]
    assert "6 trainings of 2 steps" in shown.text and "Cannot tell yet whether pretraining pays here" in shown.text
    assert "with 50 % of the labels neither arm learns much" in shown.text  # of two steps
    scores = re.findall(r"^\| 50 % \| (\w+) \| 2 \| (?:[\d.]+ ± [\d.]+ \| ){6}", shown.text, re.MULTILINE)
    assert scores == ["random", "stage1", "stage2"]
    assert re.findall(r"^\| 50 % \| (\w+) \| [+-][\d.]+ \| 2 \|", shown.text, re.MULTILINE) == ["stage1", "stage2"]
    assert "random: no pretraining" in shown.text and re.search(r"stage2: \d+ s of pretraining", shown.text)

    (page,) = tmp_path.glob("simdetr-*/worth/report/index.html")
    assert f"The page of this comparison: {page}" in shown.text
    rows = json.loads((page.parents[1] / "comparison.json").read_text())
    assert {(row["initialisation"], row["seed"], row["images"]) for row in rows} == {
        (arm, seed, 4) for arm in ("random", "stage1", "stage2") for seed in (0, 1)
    }


@pytest.mark.slow
def test_ten_boxes_become_labels_and_a_detector(two_classes, tmp_path):
    shown = execute(FEW_LABELS, tmp_path, SIMDETR_STEPS="30")
    assert "80 to label, 40 kept out; the class is speckled_star" in shown.text
    assert "10 shots of speckled_star on" in shown.text
    assert shown.pictures >= 15
    left = re.findall(r"^ +(?:sure enough|verified|corrected) +(\d+) +(\d+)%", shown.text, re.MULTILINE)
    counts, precisions = zip(*((int(count), int(percent)) for count, percent in left), strict=True)
    assert len(left) == 3 and counts[0] > counts[1] >= counts[2] > 0
    assert precisions[0] < precisions[1] <= precisions[2]
    assert REASONS["negative"] in shown.text and f"{counts[2]} new labels beside 10 shots" in shown.text
    assert re.search(r"^ +with new labels +[\d.]+%", shown.text, re.MULTILINE)
    assert re.search(r"^round 1: \d+ errors left \(\d+ to \d+\), really \d+", shown.text, re.MULTILINE)

    truth = read_labels(two_classes / "instances.json")
    shots = truth.select([name for name in truth.image_ids if len(truth.of(name))][:2])
    write_coco(shots, tmp_path / "shots.json")
    name = truth.categories[int(shots.classes[0])].name
    inputs = {"SIMDETR_IMAGES": two_classes, "SIMDETR_SHOTS": tmp_path / "shots.json", "SIMDETR_CLASS": name}
    inputs["SIMDETR_RUN"] = next(tmp_path.glob("simdetr-*/pretrained"))
    shown = execute(FEW_LABELS, tmp_path, **inputs, SIMDETR_STEPS="2")
    kept_out = len(set(truth.image_ids[2::3]) - set(shots.image_ids))
    assert f"{12 - kept_out} to label, {kept_out} kept out; the class is {name}" in shown.text
    assert "pretraining:" not in shown.text and "precision" not in shown.text
    assert "No labels given" in shown.text and "To be inspected: " in shown.text


def table(shown: Shown, title: str) -> list[str]:
    """First words of the rows of the table of MaxBoxAcc below its title."""
    rows = shown.text.split(f"\n{title}\n\n", 1)[1].splitlines()
    return [row.split()[0] for row in rows[1 : rows.index("")]]
