"""From output to detections: logits and normalised boxes in, scores, labels and pixel boxes of each image out.

Two ways to read the same outputs. ``postprocess`` ranks all pairs of query and class, as COCO's numbers are made by
Deformable DETR and its kin: every score that people see is made of them. ``best_per_query`` keeps one class of each
query: for the labels of self-training, and for numbers that ask where objects are whatever their class, where one box
under several classes would take the places of others. Without options nothing is suppressed and nothing is cut off: a
detection transformer does not repeat itself by design. Boxes are cut to the image.
Letters: B images, Q queries, K classes, N detections of one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from simdetr.boxes import clip, denormalise, denormalise_points, has_area, suppress_overlaps


class Detections(TypedDict):
    """Detections of one image, best first; N is at most ``top_k``."""

    scores: Tensor
    """float32 [N] in [0, 1]."""
    labels: Tensor
    """int64 [N], classes from 0."""
    boxes_xyxy: Tensor
    """float32 [N, 4], pixels of the original image, cut to it."""
    queries: Tensor
    """int64 [N], the query of each; after ``postprocess`` one may come several times, with several classes."""
    points: NotRequired[Tensor]
    """float32 [N, 2], reference points in pixels of the original image, of landmark heads."""


class Findings(NamedTuple):
    """What one forward pass says of one image, for scoring."""

    detections: Detections
    """Of ``postprocess``: for AP, and for all that asks for the class."""
    objects: Detections
    """Of ``best_per_query``: for recall whatever the class, and for points paired by distance."""


@dataclass(frozen=True)
class _Rule:
    """What is kept of an image; attributes as the arguments of ``postprocess``."""

    top_k: int
    min_score: float
    iou_threshold: float
    point_radius: float | None
    by_class: bool
    """Boxes of different classes do not suppress each other."""

    def candidates(self, num_queries: int, has_points: bool) -> int:
        """How many of the best pairs are looked at; where some may go, more than are kept."""
        may_suppress = self.iou_threshold < 1 or has_points
        return max(num_queries, 10 * self.top_k) if may_suppress else self.top_k


def postprocess(
    outputs: Mapping[str, Any],
    orig_sizes: Tensor | Sequence[tuple[int, int]],
    top_k: int = 100,
    *,
    min_score: float = 0.0,
    iou_threshold: float = 1.0,
    point_radius: float | None = None,
) -> list[Detections]:
    """Best pairs of query and class of every image; a query may appear with several classes.

    Boxes without area and what is not finite are no detections.

    Args:
        outputs: ``pred_logits`` [B, Q, K] and ``pred_boxes`` [B, Q, 4] cxcywh, fractions of the valid image; of
            landmark heads ``pred_points`` [B, Q, 2] too, and ``point_logits``, which take the place of the logits, and
            ``point_cells`` [B, 2], see ``distinct_points``. Logits of -inf are no detections.
        orig_sizes: (height, width) of the original images in pixels, [B, 2].
        top_k: most detections per image.
        min_score: detections below it go.
        iou_threshold: of two boxes of a class that overlap more, the less confident goes; 1 keeps both. Of the pairs
            the max(Q, 10 · ``top_k``) best are looked at.
        point_radius: part of the image's diagonal within which a less confident point of the same class goes; 0 keeps
            all, None those that are no duplicates of a grid's, see ``distinct_points``.

    Returns:
        One record per image, on the device of the outputs.

    Raises:
        ValueError: not one size per image, or ``top_k`` below 1.
    """
    rule = _Rule(top_k, min_score, iou_threshold, point_radius, by_class=True)
    return _detections(outputs, class_logits(outputs), orig_sizes, rule)


def best_per_query(
    outputs: Mapping[str, Any],
    orig_sizes: Tensor | Sequence[tuple[int, int]],
    top_k: int = 100,
    *,
    min_score: float = 0.0,
    iou_threshold: float = 1.0,
    point_radius: float | None = None,
) -> list[Detections]:
    """Every query once, with its best class; boxes suppress each other whatever their class.

    How sure a detection is says its objectness, of detectors that learn it (``pred_objectness``), else its class's
    score: an object whose looks are spread over many classes is no less an object. Arguments, result and errors are
    those of ``postprocess``.
    """
    logits = class_logits(outputs)
    best = logits.argmax(dim=2, keepdim=True)
    certain = logits.gather(2, best)
    if "pred_objectness" in outputs and "point_logits" not in outputs:
        certain = torch.where(certain > -torch.inf, outputs["pred_objectness"].detach().float(), certain)
    alone = torch.full_like(logits, -torch.inf).scatter(2, best, certain)
    rule = _Rule(top_k, min_score, iou_threshold, point_radius, by_class=False)
    return _detections(outputs, alone, orig_sizes, rule)


def findings(
    outputs: Mapping[str, Any], orig_sizes: Tensor | Sequence[tuple[int, int]], top_k: int = 100
) -> list[Findings]:
    """Both readings of every image; arguments and errors are those of ``postprocess``."""
    readings = postprocess(outputs, orig_sizes, top_k), best_per_query(outputs, orig_sizes, top_k)
    return [Findings(*pair) for pair in zip(*readings, strict=True)]


def class_logits(outputs: Mapping[str, Any]) -> Tensor:
    """Logits that detections are ranked by, float32 [B, Q, K]: a landmark head's own, or else the detector's."""
    logits: Tensor = outputs.get("point_logits", outputs["pred_logits"])
    return logits.detach().float()


@torch.no_grad()
def _detections(
    outputs: Mapping[str, Any], logits: Tensor, orig_sizes: Tensor | Sequence[tuple[int, int]], rule: _Rule
) -> list[Detections]:
    """What the rule keeps of ``logits`` [B, Q, K], image by image."""
    if rule.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {rule.top_k}")
    if len(orig_sizes) != len(logits):
        raise ValueError(f"orig_sizes has {len(orig_sizes)} rows, but outputs has {len(logits)} images")
    sizes = orig_sizes.tolist() if isinstance(orig_sizes, Tensor) else orig_sizes
    columns = {name: outputs[name].float() for name in ("pred_boxes", "pred_points", "point_cells") if name in outputs}
    return [
        _of_image(row, {name: column[index] for name, column in columns.items()}, (int(size[0]), int(size[1])), rule)
        for index, (row, size) in enumerate(zip(logits, sizes, strict=True))
    ]


def _of_image(logits: Tensor, columns: Mapping[str, Tensor], size_hw: tuple[int, int], rule: _Rule) -> Detections:
    """Detections of one image of ``logits`` [Q, K] and the other outputs' rows."""
    num_queries, num_classes = logits.shape
    boxes = clip(denormalise(columns["pred_boxes"], size_hw), size_hw)
    points = denormalise_points(columns["pred_points"], size_hw) if "pred_points" in columns else None
    # a landmark may have no extent
    usable = has_area(boxes) if points is None else torch.isfinite(points).all(dim=1)
    ranked = torch.where(usable[:, None] & (logits > -torch.inf), logits, -torch.inf).flatten()
    ranks, pairs = ranked.topk(min(rule.candidates(num_queries, points is not None), len(ranked)))
    kept = torch.nonzero((ranks > -torch.inf) & (ranks.sigmoid() >= rule.min_score)).flatten()
    queries, labels = pairs // num_classes, pairs % num_classes
    if rule.iou_threshold < 1:
        classes = labels[kept] if rule.by_class else None
        kept = kept[suppress_overlaps(boxes[queries[kept]], ranks[kept], rule.iou_threshold, classes)]
    if points is not None:
        cells = denormalise_points(columns["point_cells"], size_hw) if "point_cells" in columns else None
        kept = kept[distinct_points(points[queries[kept]], labels[kept], size_hw, rule.point_radius, cells)]
    kept = kept[: rule.top_k]
    found: Detections = {
        "scores": ranks[kept].sigmoid(),
        "labels": labels[kept],
        "boxes_xyxy": boxes[queries[kept]],
        "queries": queries[kept],
    }
    if points is not None:
        found["points"] = points[queries[kept]]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# From predicted landmarks to those that are kept. N landmarks of one image, M of them kept.


DUPLICATE_CELLS = 0.5
"""Distance, in subregions of a grid, within which two points of a class are one landmark's. A grid is taught to repeat
itself: every subregion that a landmark reaches into predicts the landmark's point (``heads.landmark_grid``)."""


def distinct_points(
    points: Tensor, classes: Tensor, size_hw: tuple[int, int], radius: float | None = None, cells: Tensor | None = None
) -> Tensor:
    """Which landmarks stay, int64 [M] ascending: those without a more confident one of their class around that stays.

    Whether one stays depends on more confident ones alone, so leaving out the unsure changes nothing for the others.
    The best one's place is kept as it is: a mean over the group would move with every unsure neighbour.

    Args:
        points: [N, 2] in pixels, best first.
        classes: [N].
        size_hw: height and width of the image in pixels.
        radius: how far "around" is, as a part of the image's diagonal; 0 keeps all. None for half a subregion, and to
            keep all landmarks that come of no grid: queries are taught not to repeat each other.
        cells: width and height of a subregion in pixels [2], of landmarks that come of a grid.
    """
    if radius is not None and not radius >= 0:
        raise ValueError(f"point_radius: expected None, 0 or a part of the image's diagonal such as 0.02, got {radius}")
    if radius == 0 or (radius is None and cells is None):
        return torch.arange(len(points), device=points.device)
    units, reach = np.ones(2), (radius or 0.0) * math.hypot(*size_hw)
    if radius is None and cells is not None:
        units, reach = cells.double().cpu().numpy(), DUPLICATE_CELLS
    # each step depends on the one before: on the host that costs least
    places, kinds = points.double().cpu().numpy() / units, classes.cpu().numpy()
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    near = (apart <= reach) & (kinds[:, None] == kinds[None])
    gone = np.zeros(len(places), bool)
    kept: list[int] = []
    for index in range(len(places)):
        if not gone[index]:
            kept.append(index)
            gone |= near[index]
    return torch.tensor(kept, dtype=torch.int64, device=points.device)
