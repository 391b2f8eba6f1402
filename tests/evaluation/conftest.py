from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from simdetr.data.labels import Category, ImageLabels, Labels

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
