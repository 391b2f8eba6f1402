"""Where the boxes of each stage come from: labels with lineage in, a table and colours for the report out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simdetr.data.labels import ImageLabels, Labels
from simdetr.data.lineage import Lineage
from simdetr.evaluation.drawing import Colour, class_colour


def stage_title(stage: int) -> str:
    """What a stage's boxes are called: mined for stage 0, stage j for those of the j-th detector."""
    return {-1: "labelled by people", 0: "mined"}.get(stage, f"stage {stage}")


def birth_colour(born: int) -> Colour:
    """Colour of the boxes that a stage found first, RGB 0..255."""
    return class_colour(born + 1)


def birth_colours(boxes: ImageLabels, rows: NDArray[np.intp]) -> list[Colour]:
    """Colour of some of an image's boxes by the stage that found them first; people's where nothing is known."""
    born = np.full(len(rows), -1) if boxes.lineage is None else boxes.lineage.born[rows]
    return [birth_colour(stage) for stage in born.tolist()]


def births(stages: Mapping[int, Labels], *, truth: bool) -> list[tuple[str, Colour]]:
    """Legend of `birth_colours`: the stages that found any box first, and people if there are boxes of theirs."""
    lineages = [labels.lineage for labels in stages.values() if labels.lineage is not None]
    found = {born for lineage in lineages for born in np.unique(lineage.born).tolist() if born >= 0}
    shown = [*sorted(found), -1] if truth else sorted(found)  # people last, as their pictures are
    return [(stage_title(born), birth_colour(born)) for born in shown]


def origin_rows(stages: Mapping[int, Labels]) -> list[dict[str, Any]]:
    """One row per stage, for the stages in which lineage is known.

    Args:
        stages: labels by stage.

    Returns:
        Rows of ``stage`` (its title), ``boxes``, ``mined_left``: how many mined boxes a box of this stage goes on from,
        ``mined``: how many there were (None without stage 0), and ``shares``: fraction of the boxes by origin. Origins
        are ``stride 32, K 2`` for mined boxes, coarsest first, and the title of the first stage for all others.
    """
    mined = len(stages[0].classes) if 0 in stages else None
    rows = []
    for stage, labels in stages.items():
        lineage = labels.lineage
        if lineage is None:
            continue
        image = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
        ancestors = _distinct(image, lineage.born_row)[lineage.born == 0]
        _, firsts, counts = np.unique(
            _distinct(lineage.born, -lineage.stride, lineage.k), return_index=True, return_counts=True
        )
        shares = {_title(lineage, box): count / len(image) for box, count in zip(firsts, counts.tolist(), strict=True)}
        row = {
            "stage": stage_title(stage),
            "boxes": len(image),
            "mined_left": len(np.unique(ancestors)),
            "mined": mined,
        }
        rows.append(row | {"shares": shares})
    return rows


def _distinct(*columns: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """One number per row, in the order of the rows: to count distinct rows by numbers is tenfold faster."""
    number = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        number = number * (high - low + 1) + (column.astype(np.int64) - low)
    return number


def _title(lineage: Lineage, box: int) -> str:
    stride, k = int(lineage.stride[box]), int(lineage.k[box])
    return f"stride {stride}, K {k}" if k else stage_title(int(lineage.born[box]))
