"""From output to detections: logits and normalised boxes in, scores, labels and pixel boxes of each image out.

No suppression and no threshold: a detection transformer does not repeat itself by design. Source: specs/detectors.md
A9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from simdetr.boxes import denormalise, denormalise_points


class Detections(TypedDict):
    """Detections of one image, best first; N = min(top_k, Q · K), less where a detector found fewer (-inf)."""

    scores: Tensor
    """float32 [N] in [0, 1]."""
    labels: Tensor
    """int64 [N], classes from 0."""
    boxes_xyxy: Tensor
    """float32 [N, 4], pixels of the original image."""
    points: NotRequired[Tensor]
    """float32 [N, 2], reference points in pixels of the original image, of landmark heads."""


@torch.no_grad()
def postprocess(
    outputs: Mapping[str, Any], orig_sizes: Tensor | Sequence[tuple[int, int]], top_k: int = 100
) -> list[Detections]:
    """Best pairs of query and class of every image; a query may appear with several classes.

    Args:
        outputs: ``pred_logits`` [B, Q, K] and ``pred_boxes`` [B, Q, 4] cxcywh, fractions of the valid image; of
            landmark heads ``pred_points`` [B, Q, 2] too, and ``point_logits``, which take the place of the logits.
        orig_sizes: (height, width) of the original images in pixels, [B, 2].
        top_k: most detections per image.

    Returns:
        One record per image, on the device of the outputs.

    Raises:
        ValueError: not one size per image, or ``top_k`` below 1.
    """
    logits, boxes = outputs.get("point_logits", outputs["pred_logits"]), outputs["pred_boxes"]
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if len(orig_sizes) != len(logits):
        raise ValueError(f"orig_sizes has {len(orig_sizes)} rows, but outputs has {len(logits)} images")
    sizes = orig_sizes.tolist() if isinstance(orig_sizes, Tensor) else orig_sizes
    num_classes = logits.shape[2]
    scores, best = logits.float().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
    found: list[Detections] = []
    for index, (logit, row, size) in enumerate(zip(scores, best, sizes, strict=True)):
        real = logit > -torch.inf
        query, size_hw = row[real] // num_classes, (int(size[0]), int(size[1]))
        pixels = denormalise(boxes[index, query].float(), size_hw)
        found.append({"scores": logit[real].sigmoid(), "labels": row[real] % num_classes, "boxes_xyxy": pixels})
        if "pred_points" in outputs:
            found[-1]["points"] = denormalise_points(outputs["pred_points"][index, query].float(), size_hw)
    return found
