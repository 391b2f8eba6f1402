"""From output to detections: logits and normalised boxes in, scores, labels and pixel boxes of each image out.

No suppression and no threshold: a detection transformer does not repeat itself by design. Source: specs/detectors.md
A9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from simdetr.boxes import denormalise


class Detections(TypedDict):
    """Detections of one image, best first; N = min(top_k, Q · K), less where a detector found fewer (-inf)."""

    scores: Tensor
    """float32 [N] in [0, 1]."""
    labels: Tensor
    """int64 [N], classes from 0."""
    boxes_xyxy: Tensor
    """float32 [N, 4], pixels of the original image."""


@torch.no_grad()
def postprocess(
    outputs: Mapping[str, Any], orig_sizes: Tensor | Sequence[tuple[int, int]], top_k: int = 100
) -> list[Detections]:
    """Best pairs of query and class of every image; a query may appear with several classes.

    Args:
        outputs: ``pred_logits`` [B, Q, K] and ``pred_boxes`` [B, Q, 4] cxcywh, fractions of the valid image.
        orig_sizes: (height, width) of the original images in pixels, [B, 2].
        top_k: most detections per image.

    Returns:
        One record per image, on the device of the outputs.

    Raises:
        ValueError: not one size per image, or ``top_k`` below 1.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if len(orig_sizes) != len(logits):
        raise ValueError(f"orig_sizes has {len(orig_sizes)} rows, but outputs has {len(logits)} images")
    sizes = orig_sizes.tolist() if isinstance(orig_sizes, Tensor) else orig_sizes
    num_classes = logits.shape[2]
    scores, best = logits.float().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
    chosen = boxes.float().gather(1, (best // num_classes)[..., None].expand(-1, -1, 4))
    found: list[Detections] = []
    for logit, row, cxcywh, size in zip(scores, best, chosen, sizes, strict=True):
        real = logit > -torch.inf
        pixels = denormalise(cxcywh[real], (int(size[0]), int(size[1])))
        found.append({"scores": logit[real].sigmoid(), "labels": row[real] % num_classes, "boxes_xyxy": pixels})
    return found
