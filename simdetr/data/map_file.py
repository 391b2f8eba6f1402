"""A map in one JSON file: cameras, landmarks and the poses of images in, what `map_targets` takes out.

    {"camera": {"width": 1280, "height": 720, "fov_deg": 60},
     "landmarks": [{"class": "sign", "xyz": [2, -1, 20]}],
     "images": [{"id": "a.png", "position": [0, 0, 0], "rotation": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "hidden": [0]}]}

A camera may have ``matrix`` (3 × 3) in place of ``fov_deg``, and ``distortion`` (k1, k2, p1, p2, k3); an image may have
a ``camera`` of its own. ``rotation`` is world to camera, ``position`` the camera's centre in metres, and ``hidden`` has
the places, from 0, of landmarks that something hides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data.image_labels import Category, LabelError
from simdetr.data.map_projection import Camera, MapLandmarks, Pose, View


def read_map(path: str | Path) -> tuple[MapLandmarks, list[View], NDArray[np.bool_]]:
    """Read a map file.

    Returns:
        The landmarks (classes by name, numbered from 1 in its order), the views, and which landmark is in sight of
        which view, bool [V, M]: the arguments of `map_targets`.

    Raises:
        LabelError: the file cannot be read, or an entry is missing or wrong; it is named.
    """
    path = Path(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise LabelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("landmarks", "images")):
        raise LabelError(f"{path} is no map: expected an object with the lists landmarks and images")
    place = "landmarks"
    try:
        names = [str(entry["class"]) for entry in content["landmarks"]]
        classes = sorted(set(names))
        landmarks = MapLandmarks(
            np.array([entry["xyz"] for entry in content["landmarks"]], dtype=np.float64),
            np.array([classes.index(name) for name in names], dtype=np.int64),
            tuple(Category(number + 1, name) for number, name in enumerate(classes)),
        )
        place = "camera"
        shared = _camera(content["camera"]) if "camera" in content else None
        views = []
        visible = np.ones((len(content["images"]), len(names)), np.bool_)
        for row, entry in enumerate(content["images"]):
            place = f"images, number {row + 1}"
            views.append(_view(entry, shared))
            visible[row, _hidden(entry, len(names))] = False
    except KeyError as error:
        raise LabelError(f"{path}: {place}: expected the field {error}") from error
    except (TypeError, ValueError) as error:
        raise LabelError(f"{path}: {place}: {error}") from error
    return landmarks, views, visible


def _camera(entry: dict[str, Any]) -> Camera:
    width, height, distortion = int(entry["width"]), int(entry["height"]), entry.get("distortion", [0.0] * 5)
    if "matrix" in entry:
        return Camera(width, height, entry["matrix"], distortion)
    return Camera.from_field_of_view(float(entry["fov_deg"]), width, height, distortion)


def _view(entry: dict[str, Any], shared: Camera | None) -> View:
    camera = shared if shared is not None and "camera" not in entry else _camera(entry["camera"])
    return View(str(entry["id"]), camera, Pose(entry["rotation"], entry["position"]))


def _hidden(entry: dict[str, Any], count: int) -> list[int]:
    rows: list[int] = entry.get("hidden", [])
    if not all(isinstance(row, int) and 0 <= row < count for row in rows):
        raise ValueError(f"hidden: expected places of landmarks from 0 to {count - 1}, got {rows}")
    return rows
