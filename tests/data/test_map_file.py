import json

import numpy as np
import pytest

from simdetr.data.annotations import LabelError
from simdetr.data.map3d import map_targets, read_map

EYE = np.eye(3).tolist()


def content():
    return {
        "camera": {"width": 1280, "height": 720, "matrix": [[1000, 0, 640], [0, 1000, 360], [0, 0, 1]]},
        "landmarks": [{"class": "sign", "xyz": [2, -1, 20]}, {"class": "mark", "xyz": [0, 0, 10]}],
        "images": [
            {"id": "a.png", "position": [0, 0, 0], "rotation": EYE},
            {"id": "b.png", "position": [0, 0, 0], "rotation": EYE, "hidden": [1]},
            {
                "id": "c.png",
                "position": [0, 0, 0],
                "rotation": EYE,
                "camera": {"width": 64, "height": 48, "fov_deg": 90, "distortion": [0, 0, 0, 0, 0]},
            },
        ],
    }


def written(tmp_path, change):
    made = content()
    change(made)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(made))
    return path


def test_a_map_becomes_labels(tmp_path):
    labels = map_targets(*read_map(written(tmp_path, lambda made: None)))
    assert [category.name for category in labels.categories] == ["mark", "sign"]
    assert [labels.of(name).points.tolist() for name in ("a.png", "b.png")] == [[[740, 310], [640, 360]], [[740, 310]]]
    assert labels.of("a.png").classes.tolist() == [1, 0]
    assert labels.of("c.png").size_hw == (48, 64) and labels.of("c.png").points[1].tolist() == [32, 24]
    empty = map_targets(*read_map(written(tmp_path, lambda made: made.update(landmarks=[], images=made["images"][:1]))))
    assert len(empty) == 1 and len(empty.points) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("images"), "map.json is no map: expected an object with the lists landmarks and images"),
        (lambda made: made["landmarks"][0].pop("xyz"), "landmarks: expected the field 'xyz'"),
        (lambda made: made["landmarks"][0].update(xyz=[1, 2]), "map.json: landmarks: "),
        (lambda made: [entry.update(xyz=[1, 2]) for entry in made["landmarks"]], "points_xyz: expected n × 3 finite"),
        (lambda made: made["landmarks"].append(5), "map.json: landmarks: "),
        (lambda made: made["camera"].pop("matrix"), "camera: expected the field 'fov_deg'"),
        (lambda made: made["camera"].update(matrix=EYE[:2]), "camera: camera matrix: expected 3 × 3"),
        (lambda made: made.pop("camera"), "images, number 1: expected the field 'camera'"),
        (lambda made: made["images"][1].pop("position"), "images, number 2: expected the field 'position'"),
        (lambda made: made["images"][2]["camera"].update(fov_deg=180), "images, number 3: horizontal_deg: expected"),
        (
            lambda made: made["images"][0].update(rotation=[[2, 0, 0]] * 3),
            "images, number 1: rotation: expected an orth",
        ),
        (lambda made: made["images"][1].update(hidden=[2]), r"number 2: hidden: expected places .* 0 to 1, got \[2\]"),
        (lambda made: made["images"][1].update(hidden=True), "map.json: images, number 2: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(LabelError, match=message):
        read_map(written(tmp_path, change))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LabelError, match=r"missing.json cannot be read as JSON"):
        read_map(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(LabelError, match=r"text.json cannot be read as JSON"):
        read_map(tmp_path / "text.json")
