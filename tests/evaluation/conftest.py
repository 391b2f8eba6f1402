from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from simdetr.data.annotations import Category, ImageLabels
from simdetr.data.labels import Labels

Box = tuple[float, ...]  # x0, y0, x1, y1, class index and, if given, score


@pytest.fixture
def make_labels() -> Callable[..., Labels]:
    """Labels from {image id: [(x0, y0, x1, y1, class, score)]} on images of 640 by 640 pixels."""

    def make(
        images: Mapping[str, Sequence[Box]],
        category_ids: Sequence[int | str] = (1,),
        crowd: Sequence[bool] | None = None,
        stage: int = -1,
    ) -> Labels:
        rows, start = [], 0
        for image_id, boxes in images.items():
            table = np.asarray([(*box, 1.0)[:6] for box in boxes], np.float64).reshape(-1, 6)
            flags = None if crowd is None else crowd[start : start + len(table)]
            start += len(table)
            rows.append(ImageLabels.build(image_id, (640, 640), table[:, :4], table[:, 4], table[:, 5], flags))
        return Labels.from_images(rows, [Category(id_, f"kind {id_}") for id_ in category_ids], stage)

    return make


@pytest.fixture
def make_points() -> Callable[..., Labels]:
    """Labels with points from {image id: [(x, y, class, score)]}; their boxes have no area unless given for all."""

    def make(
        images: Mapping[str, Sequence[tuple[float, ...]]],
        classes: int = 1,
        boxes: Sequence[tuple[float, ...]] | None = None,
        crowd: Sequence[bool] | None = None,
        size_hw: tuple[int, int] = (640, 640),
    ) -> Labels:
        rows, start = [], 0
        for image_id, points in images.items():
            table = np.asarray([(*point, 1.0)[:4] for point in points], np.float64).reshape(-1, 4)
            own = slice(start, start + len(table))
            start += len(table)
            corners = np.nan_to_num(np.tile(table[:, :2], 2)) if boxes is None else boxes[own]
            flags = None if crowd is None else crowd[own]
            row = ImageLabels.build(
                image_id, size_hw, corners, table[:, 2], table[:, 3], flags, points=table[:, :2].astype(np.float32)
            )
            rows.append(row)
        return Labels.from_images(rows, [Category(index + 1, f"kind {index}") for index in range(classes)])

    return make


@pytest.fixture
def random_points(make_points: Callable[..., Labels]) -> Callable[[int], tuple[Labels, Labels]]:
    """Truth and predictions of three classes on eight images by a seed: some near, some wrong, missing or invented."""

    def make(seed: int) -> tuple[Labels, Labels]:
        rng = np.random.default_rng(seed)
        truth: dict[str, list[tuple[float, ...]]] = {}
        found: dict[str, list[tuple[float, ...]]] = {}
        for index in range(8):
            points = [(*rng.uniform(0, 640, 2), int(rng.integers(3))) for _ in range(index)]  # the first has none
            truth[str(index)] = points
            found[str(index)] = [
                (x + rng.normal(0, 12), y + rng.normal(0, 12), label if rng.random() < 0.8 else 0, rng.random())
                for x, y, label in points
                for _ in range(rng.integers(0, 4))
            ]
            found[str(index)] += [(*rng.uniform(0, 640, 2), int(rng.integers(3)), rng.random()) for _ in range(3)]
        return make_points(truth, 3), make_points(found, 3)

    return make
