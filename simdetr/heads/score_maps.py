"""Where a localisation head looks: attention or class evidence of a level in, score maps and boxes out.

Source: KR 10-2022-0050617, claims 1 and 5, [0059] and [0060].
Letters: B images, C channels, K classes, S pixels of a score map's side.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from simdetr.boxes import normalise
from simdetr.evaluation.heat_map_boxes import heat_map_boxes
from simdetr.heads.attention import normalised_attention

MapSource = Literal["last_attention", "first_attention", "importance", "dropped_foreground", "cam", "product"]
"""What a score map shows.

``last_attention``, ``first_attention``: A of the last and of the first tap. ``importance``, ``dropped_foreground``:
σ(a) and the dropped foreground mask of the first tap, as in claim 1. ``product``: the maps of first and last attention
multiplied. ``cam``: the last map weighted by a class's weights.
"""


def chosen_classes(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The class of each image, int64 [B]: the given one, which a ValueError checks, else that of the highest logit."""
    if labels is None:
        return logits.argmax(dim=1)
    batch, num_classes = logits.shape
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected one per image [{batch}], got {list(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {int(wrong[0])}")
    return labels


def class_activation(features: Tensor, class_weights: Tensor) -> Tensor:
    """Evidence [B, h, w] for one class of each image: features [B, C, h, w] times its weights [B, C]."""
    return torch.einsum("bchw,bc->bhw", features, class_weights)


def upsampled_map(values: Tensor, padding: Tensor, side: int) -> Tensor:
    """Maps [B, S, S], bicubic and stretched to [0, 1], of values [B, h, w] above and left of each image's padding."""
    rows, columns = (~padding[:, :, 0]).sum(dim=1).tolist(), (~padding[:, 0]).sum(dim=1).tolist()
    maps = [
        F.interpolate(image[None, None, :height, :width], (side, side), mode="bicubic")[0]
        for image, height, width in zip(values, rows, columns, strict=True)
    ]
    return stretched(torch.cat(maps))


def stretched(maps: Tensor) -> Tensor:
    """Maps [B, h, w] each stretched to [0, 1]; constant ones become 0."""
    return normalised_attention(maps, torch.zeros_like(maps, dtype=torch.bool))


def score_map_boxes(score_maps: Tensor, threshold: float) -> Tensor:
    """The box of the largest part of each map [B, S, S] above a share in [0, 1) of its maximum.

    Boxes are cxcywh [B, 4], fractions of the map; all 0 for a constant map.
    """
    pixels = [torch.from_numpy(heat_map_boxes(values.cpu().numpy(), threshold)[0]) for values in score_maps]
    boxes = torch.stack(pixels).to(score_maps.device)
    return normalise(boxes, (score_maps.shape[1], score_maps.shape[2]))
