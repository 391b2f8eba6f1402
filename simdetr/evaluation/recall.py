"""How many objects do the boxes find, whatever their class? Human truth and proposals in, recall numbers out.

The one class-agnostic measure: for mined regions, pseudo-labels of any stage, and detectors. Average recall (AR) is the
recall averaged over IoU 0.50:0.05:0.95 with the k best-scored boxes of every image (Hosang et al., What makes for
effective detection proposals?, 2015; COCO's AR with ``useCats=0``), by pycocotools' matching.
The names carry an ``@``, so that they differ from the AR per class of `coco_metrics`.
Source: US 2025/0265826, proposal tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from simdetr.data.labels import Labels
from simdetr.evaluation.coco_metric import SIZE_SUFFIX, match_boxes


def proposal_recall(truth: Labels, proposals: Labels, max_boxes: Sequence[int] = (1, 10, 25, 100)) -> dict[str, float]:
    """Class-agnostic recall of the boxes, overall and by object size.

    Args:
        truth: the human labels; crowd boxes neither count nor punish, images without proposals count as missed.
        proposals: boxes on the truth's images. The best-scored come first; boxes of equal score, as mined ones are,
            count in the order in which they stand.
        max_boxes: the numbers k of boxes per image to report.

    Returns:
        Fractions in 0..1 per k: ``AR@{k}`` over IoU 0.50:0.95 and ``recall50@{k}`` at IoU 0.50; the same with suffix
        ``s``, ``m``, ``l`` for objects below 32², between, and above 96² px². ``nan`` where there is no such object.

    Raises:
        ValueError: proposals for images that the truth does not hold, or ``max_boxes`` empty or below 1.

    Example:
        >>> proposal_recall(truth, mined)["AR@100s"]  # doctest: +SKIP
    """
    scores = match_boxes(truth, proposals, class_agnostic=True, max_boxes=max_boxes)
    recall = {}
    for size, suffix in SIZE_SUFFIX.items():
        for boxes in scores.max_boxes:
            recall[f"AR@{boxes}{suffix}"] = scores.average_recall(boxes, size=size)
            recall[f"recall50@{boxes}{suffix}"] = scores.average_recall(boxes, size=size, iou=50)
    return recall
