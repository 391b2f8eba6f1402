"""Recognised points and a 3-D map in, pairs of pixels and map points out, for a solver that finds the camera's pose.

Source: seed 004 names the pose of a vehicle as a use of recognised landmarks, and no method; specs/heads.md 1.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from simdetr.data import points as point_columns
from simdetr.data.labels import Labels
from simdetr.data.map_projection import MapLandmarks, View, project

COLUMNS = ["image", "class", "score", "x_px", "y_px", "map_x", "map_y", "map_z", "landmark", "error_px"]


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
        usable = (
            (names[:, None] == map_names[None]) & (errors <= radius_px) & point_columns.known(found.points)[:, None]
        )
        # a pair that is not allowed costs more than any that is, so that as many as possible are made
        costs = np.where(usable, errors, 1e3 * (radius_px + 1) * (1 + min(usable.shape, default=0)))
        for row, place in zip(*linear_sum_assignment(costs), strict=True):
            if usable[row, place]:
                values = (found.scores[row], *found.points[row], *landmarks.points_xyz[place])
                rows.append([view.image_id, names[row], *map(float, values), int(place), float(errors[row, place])])
    return pd.DataFrame(rows, columns=COLUMNS)
