"""Landmarks of a 3-D map, poses and a camera in; points in the images out, as `Labels` to train on; and back.

Back are pairs of recognised points and map points, for a solver that finds the camera's pose.

Source: US 11,544,507 (training points come from a map, of the landmarks that the sensor could see; it names the pose of
a vehicle as a use of recognised landmarks, and no method).
Camera frame: x right, y down, z forward, in metres. Pixels count from the outer corner of the top left pixel, so a
camera matrix from OpenCV, which counts from that pixel's centre, needs 0.5 added to cx and cy. Letters: n map points, M
map landmarks, V views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from simdetr.data import points as point_columns
from simdetr.data.annotations import Category, ImageLabels, LabelError
from simdetr.data.labels import Labels
from simdetr.data.storage import read_lists

Floats = NDArray[np.float64]
COLUMNS = ["image", "class", "score", "x_px", "y_px", "map_x", "map_y", "map_z", "landmark", "error_px"]
"""Of the table of `correspondences`."""
Z_MIN_M = 0.1
"""Points nearer than this, or behind the camera, are not seen."""
_ORTHONORMAL_TOLERANCE = 1e-3
_NEWTON_STEPS = 20


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with lens distortion.

    Attributes:
        width: of its images in pixels.
        height: of its images in pixels.
        matrix: 3 × 3, rows (fx, skew, cx), (0, fy, cy), (0, 0, 1) in pixels.
        distortion: k1, k2, p1, p2, k3 of Brown and Conrady, in OpenCV's order; zeros for none.

    Raises:
        ValueError: sizes or focal lengths that are not positive, a matrix of another form, or not five finite numbers.
    """

    width: int
    height: int
    matrix: Floats
    distortion: Floats = field(default_factory=lambda: np.zeros(5))

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1:
            raise ValueError(f"camera: expected a width and height of at least 1 px, got {self.width} × {self.height}")
        matrix = _array("camera matrix", self.matrix, (3, 3))
        if min(matrix[0, 0], matrix[1, 1]) <= 0 or matrix[1, 0] != 0 or matrix[2].tolist() != [0, 0, 1]:
            raise ValueError(
                "camera matrix: expected rows (fx, skew, cx), (0, fy, cy), (0, 0, 1) with fx and fy above 0, got "
                f"{matrix.tolist()}"
            )
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "distortion", _array("distortion (k1, k2, p1, p2, k3)", self.distortion, (5,)))

    @classmethod
    def from_field_of_view(
        cls, horizontal_deg: float, width: int, height: int, distortion: ArrayLike = (0, 0, 0, 0, 0)
    ) -> Camera:
        """A camera with square pixels that looks through the middle of its image, at more than 0 and less than 180°."""
        if not 0 < horizontal_deg < 180:
            raise ValueError(
                f"horizontal_deg: expected a field of view between 0 and 180 degrees, got {horizontal_deg}"
            )
        focal = width / 2 / math.tan(math.radians(horizontal_deg) / 2)
        matrix = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        return cls(width, height, matrix, np.asarray(distortion, np.float64))

    @cached_property
    def _widest(self) -> float:
        """Squared distance from the axis, at depth 1, from which on the distortion would fold the image back on itself.

        There the derivative 1 + 3 k1 t + 5 k2 t² + 7 k3 t³ of the distorted distance has its first root t.
        """
        k1, k2, _, _, k3 = self.distortion
        roots = np.roots([7 * k3, 5 * k2, 3 * k1, 1])
        real = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 0)]
        return float(real.min()) if len(real) else math.inf

    def sees(self, pixels: Floats, in_camera: Floats) -> NDArray[np.bool_]:
        """Which points [n, 3] of the camera frame, at these pixels [n, 2], are in front of it and in its image."""
        far_enough = in_camera[:, 2] > Z_MIN_M
        depth = np.where(far_enough, in_camera[:, 2], 1)
        unfolded = ((in_camera[:, :2] / depth[:, None]) ** 2).sum(1) < self._widest
        seen: NDArray[np.bool_] = far_enough & unfolded & ((pixels >= 0) & (pixels < (self.width, self.height))).all(1)
        return seen


@dataclass(frozen=True)
class Pose:
    """Where a camera is and where it looks: a point X of the world is rotation · (X - position) in its frame.

    Attributes:
        rotation: 3 × 3, world to camera.
        position: of the camera's centre in the world, in metres, [3].

    Raises:
        ValueError: a rotation that is not orthonormal, or numbers that are not finite.
    """

    rotation: Floats
    position: Floats

    def __post_init__(self) -> None:
        rotation = _array("rotation", self.rotation, (3, 3))
        error = float(np.linalg.norm(rotation @ rotation.T - np.eye(3)))
        if error > _ORTHONORMAL_TOLERANCE or np.linalg.det(rotation) < 0:
            raise ValueError(
                "rotation: expected an orthonormal matrix with determinant 1, world to camera; R Rᵀ is off by "
                f"{error:.3g} and the determinant is {np.linalg.det(rotation):.3g}"
            )
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "position", _array("position", self.position, (3,)))

    def to_camera(self, world: ArrayLike) -> Floats:
        """Points [n, 3] of the world in the camera's frame."""
        return (_array("points_xyz", world, (None, 3)) - self.position) @ self.rotation.T

    def to_world(self, in_camera: ArrayLike) -> Floats:
        """Points [n, 3] of the camera's frame in the world."""
        # solved, not transposed: a rotation that is orthonormal to three digits only must still lead back
        return np.linalg.solve(self.rotation, _array("points_xyz", in_camera, (None, 3)).T).T + self.position


@dataclass(frozen=True)
class MapLandmarks:
    """Landmarks of a map.

    Attributes:
        points_xyz: reference points in the world, in metres, float64 [M, 3].
        classes: int64 [M], indices into ``categories``.
        categories: the classes.

    Raises:
        ValueError: other shapes, points that are not finite, a class that is none.
    """

    points_xyz: Floats
    classes: NDArray[np.int64]
    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        points = _array("points_xyz", self.points_xyz, (None, 3))
        classes = np.asarray(self.classes, dtype=np.int64)
        if classes.shape != (len(points),) or ((classes < 0) | (classes >= len(self.categories))).any():
            raise ValueError(
                f"classes: expected {len(points)} numbers from 0 to {len(self.categories) - 1}, one per landmark, got "
                f"{classes.tolist()[:10]}"
            )
        object.__setattr__(self, "points_xyz", points)
        object.__setattr__(self, "classes", classes)


@dataclass(frozen=True)
class View:
    """An image, and from where which camera took it; its size is the camera's."""

    image_id: str
    camera: Camera
    pose: Pose


def project(points_xyz: ArrayLike, camera: Camera, pose: Pose) -> tuple[Floats, Floats]:
    """Pixels [n, 2] and depths [n] in metres of points [n, 3] of the world; behind or at the camera the pixels are NaN.

    Pixels may lie outside the image; `Camera.sees` says which are seen.
    """
    in_camera = pose.to_camera(points_xyz)
    return _pixels(in_camera, camera), in_camera[:, 2]


def back_project(pixels: ArrayLike, depths: ArrayLike, camera: Camera, pose: Pose) -> Floats:
    """Points [n, 3] of the world that are seen at pixels [n, 2] at depths [n] in metres."""
    image = _array("pixels", pixels, (None, 2))
    along = _array("depths", depths, (len(image),))
    ones = np.ones((len(image), 1))
    plane = np.linalg.solve(camera.matrix, np.concatenate([image, ones], axis=1).T).T[:, :2]
    rays = np.concatenate([_undistort(plane, camera.distortion), ones], axis=1)
    return pose.to_world(rays * along[:, None])


def map_targets(landmarks: MapLandmarks, views: Sequence[View], visible: NDArray[np.bool_] | None = None) -> Labels:
    """The landmarks that each view shows, as labels of which only the point is known.

    Training on them takes the rule ``given``, or ``bottom_right|given`` and its like, see
    `simdetr.data.reference_points`.

    Args:
        landmarks: the map.
        views: the images; those that show nothing are among the labels.
        visible: bool [V, M], False where something hides a landmark; by default nothing does.

    Raises:
        ValueError: ``visible`` of another shape.
    """
    shape = (len(views), len(landmarks.classes))
    seen = np.ones(shape, np.bool_) if visible is None else np.asarray(visible, np.bool_)
    if seen.shape != shape:
        raise ValueError(f"visible: expected shape {shape} (views, landmarks), got {seen.shape}")
    images = []
    for view, in_sight in zip(views, seen, strict=True):
        in_camera = view.pose.to_camera(landmarks.points_xyz)
        pixels = _pixels(in_camera, view.camera)
        shown = in_sight & view.camera.sees(pixels, in_camera)
        points = pixels[shown]
        size_hw = (view.camera.height, view.camera.width)
        boxes = np.tile(points, 2)
        images.append(ImageLabels.build(view.image_id, size_hw, boxes, landmarks.classes[shown], points=points))
    return Labels.from_images(images, landmarks.categories)


def read_map(path: str | Path) -> tuple[MapLandmarks, list[View], NDArray[np.bool_]]:
    """Read a map from one JSON file: cameras, landmarks and the poses of images, as `map_targets` takes them.

        {"camera": {"width": 1280, "height": 720, "fov_deg": 60},
         "landmarks": [{"class": "sign", "xyz": [2, -1, 20]}],
         "images": [{"id": "a.png", "position": [0, 0, 0], "rotation": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
                     "hidden": [0]}]}

    A camera may have ``matrix`` (3 × 3) in place of ``fov_deg``, and ``distortion`` (k1, k2, p1, p2, k3); an image may
    have a ``camera`` of its own. ``rotation`` is world to camera, ``position`` the camera's centre in metres, and
    ``hidden`` has the places, from 0, of landmarks that something hides.

    Returns:
        The landmarks (classes by name, numbered from 1 in its order), the views, and which landmark is in sight of
        which view, bool [V, M].

    Raises:
        LabelError: the file cannot be read, or an entry is missing or wrong; it is named.
    """
    path = Path(path)
    content = read_lists(path, "map", "landmarks", "images")
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
            camera = shared if shared is not None and "camera" not in entry else _camera(entry["camera"])
            views.append(View(str(entry["id"]), camera, Pose(entry["rotation"], entry["position"])))
            hidden: list[int] = entry.get("hidden", [])
            if not all(isinstance(spot, int) and 0 <= spot < len(names) for spot in hidden):
                raise ValueError(f"hidden: expected places of landmarks from 0 to {len(names) - 1}, got {hidden}")
            visible[row, hidden] = False
    except KeyError as error:
        raise LabelError(f"{path}: {place}: expected the field {error}") from error
    except (TypeError, ValueError) as error:
        raise LabelError(f"{path}: {place}: {error}") from error
    return landmarks, views, visible


def correspondences(
    recognised: Labels, landmarks: MapLandmarks, views: Sequence[View], radius_px: float = 20.0
) -> pd.DataFrame:
    """Pair recognised points with the map landmarks of their class (by name) that a rough pose puts near them.

    Args:
        recognised: labels with points, such as a landmark head's predictions.
        landmarks: the map.
        views: rough pose and camera of images; those that nothing was recognised in may be among them.
        radius_px: how far a point may lie from where the rough pose puts its landmark.

    Returns:
        One row per pair, each point and each landmark at most once per image and as near as possible in all: columns
        image, class, score, x_px and y_px of the point, map_x, map_y and map_z in metres, landmark (its place in the
        map) and error_px. ``to_csv`` or ``to_parquet`` write it.

    Raises:
        ValueError: labels without points.
    """
    if recognised.points is None:
        raise ValueError("recognised: expected labels with points, got none; predict with a landmark head")
    map_names = np.array([landmarks.categories[c].name for c in landmarks.classes], dtype=object)
    rows = []
    for view in views:
        if view.image_id not in recognised:
            continue
        found = recognised.of(view.image_id)
        assert found.points is not None
        pixels, _ = project(landmarks.points_xyz, view.camera, view.pose)
        names = np.array([recognised.categories[c].name for c in found.classes], dtype=object)
        errors = np.linalg.norm(found.points[:, None].astype(np.float64) - pixels[None], axis=2)
        known = point_columns.known(found.points)[:, None]
        usable = known & (names[:, None] == map_names[None]) & (errors <= radius_px)
        # a pair that is not allowed costs more than any that is, so that as many as possible are made
        costs = np.where(usable, errors, 1e3 * (radius_px + 1) * (1 + min(usable.shape, default=0)))
        for row, place in zip(*linear_sum_assignment(costs), strict=True):
            if usable[row, place]:
                values = (found.scores[row], *found.points[row], *landmarks.points_xyz[place])
                rows.append([view.image_id, names[row], *map(float, values), int(place), float(errors[row, place])])
    return pd.DataFrame(rows, columns=COLUMNS)


def _camera(entry: dict[str, Any]) -> Camera:
    width, height, distortion = int(entry["width"]), int(entry["height"]), entry.get("distortion", [0.0] * 5)
    if "matrix" in entry:
        return Camera(width, height, entry["matrix"], distortion)
    return Camera.from_field_of_view(float(entry["fov_deg"]), width, height, distortion)


def _array(name: str, values: ArrayLike, shape: tuple[int | None, ...]) -> Floats:
    """Values as finite float64 of a shape, in which None stands for any number."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 and shape[0] in (None, 0):
        array = array.reshape(0, *shape[1:])
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or not np.isfinite(array).all():
        wanted = " × ".join("n" if side is None else str(side) for side in shape)
        raise ValueError(f"{name}: expected {wanted} finite numbers, got shape {array.shape}: {array.tolist()!r:.200}")
    return array


def _pixels(in_camera: Floats, camera: Camera) -> Floats:
    depth = np.where(in_camera[:, 2] > 0, in_camera[:, 2], np.nan)
    plane, _ = _distort(in_camera[:, :2] / depth[:, None], camera.distortion)
    return plane @ camera.matrix[:2, :2].T + camera.matrix[:2, 2]


def _distort(plane: Floats, distortion: Floats) -> tuple[Floats, Floats]:
    """Where the lens moves points [n, 2] of the plane at depth 1, and the derivative of that, [n, 2, 2]."""
    k1, k2, p1, p2, k3 = distortion
    x, y = plane.T
    square = x**2 + y**2
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    slope = k1 + square * (2 * k2 + square * 3 * k3)
    moved_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x**2)
    moved_y = y * radial + p1 * (square + 2 * y**2) + 2 * p2 * x * y
    along_x = radial + 2 * x**2 * slope + 2 * p1 * y + 6 * p2 * x
    along_y = radial + 2 * y**2 * slope + 6 * p1 * y + 2 * p2 * x
    across = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
    derivative = np.stack([along_x, across, across, along_y], axis=1).reshape(-1, 2, 2)
    return np.stack([moved_x, moved_y], axis=1), derivative


def _undistort(plane: Floats, distortion: Floats) -> Floats:
    """The points that the lens moves to these, by Newton's method."""
    if not distortion.any():
        return plane
    found = plane
    for _ in range(_NEWTON_STEPS):
        moved, derivative = _distort(found, distortion)
        found = found - np.linalg.solve(derivative, (moved - plane)[:, :, None])[:, :, 0]
    return found
