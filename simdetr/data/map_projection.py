"""Landmarks of a 3-D map, poses and a camera in; points in the images out, as `Labels` to train on; and back.

Source: seed 004 (training points come from a map, of the landmarks that the sensor could see); specs/heads.md 1.4 step
5. Camera frame: x right, y down, z forward, in metres. Pixels count from the outer corner of the top left pixel, so a
camera matrix from OpenCV, which counts from that pixel's centre, needs 0.5 added to cx and cy. Letters: n map points, M
map landmarks, V views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simdetr.data.image_labels import Category, ImageLabels
from simdetr.data.labels import Labels

Floats = NDArray[np.float64]

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
        """A camera with square pixels that looks through the middle of its image.

        Raises:
            ValueError: an angle that is not between 0 and 180 degrees.
        """
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
    plane = np.linalg.solve(camera.matrix, np.concatenate([image, np.ones((len(image), 1))], axis=1).T).T[:, :2]
    plane = _undistort(plane, camera.distortion)
    return pose.to_world(np.concatenate([plane, np.ones((len(image), 1))], axis=1) * along[:, None])


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
        boxes = np.concatenate([points, points], axis=1)
        images.append(ImageLabels.build(view.image_id, size_hw, boxes, landmarks.classes[shown], points=points))
    return Labels.from_images(images, landmarks.categories)


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
    moved = np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x**2),
            y * radial + p1 * (square + 2 * y**2) + 2 * p2 * x * y,
        ],
        axis=1,
    )
    across = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
    rows: list[Any] = [
        [radial + 2 * x**2 * slope + 2 * p1 * y + 6 * p2 * x, across],
        [across, radial + 2 * y**2 * slope + 6 * p1 * y + 2 * p2 * x],
    ]
    return moved, np.moveaxis(np.array(rows), 2, 0)


def _undistort(plane: Floats, distortion: Floats) -> Floats:
    """The points that the lens moves to these, by Newton's method."""
    if not distortion.any():
        return plane
    found = plane
    for _ in range(_NEWTON_STEPS):
        moved, derivative = _distort(found, distortion)
        found = found - np.linalg.solve(derivative, (moved - plane)[:, :, None])[:, :, 0]
    return found
