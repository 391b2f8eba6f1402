"""Boxes and a detector in, what the detector says of them in other views of their images out: better boxes, and doubts.

The detector looks again at every image mirrored, shifted by half a cell of its finest map, and both. Where the four
views agree on a box, their mean fits better than any of them, for the errors of a view come in part from where the
object lies among the cells; what no other view shows is seldom an object. Nothing is trained, so that it works from the
first shot on, where a corrector that learns has too little to learn from.

Sources: box voting over overlapping detections (Gidaris and Komodakis, ICCV 2015, section 3.3), means over shifts
("cycle spinning", Coifman and Donoho, 1995). What was measured is in benchmarks/LOG.md, "A few labels to many".
Letters: M boxes of all images, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from simdetr.boxes import paired_iou, pairwise_iou
from simdetr.data.images import ImageSource
from simdetr.data.labels import Labels
from simdetr.detectors.predictions import Detections, postprocess
from simdetr.exchange.weights import LoadedDetector
from simdetr.training.progress import image_progress
from simdetr.training.relabel import InferenceSettings
from simdetr.training.throughput import OF_THE_MACHINE, Throughput

SAME_IOU = 0.65
"""Overlap above which a box of another view is the same box."""
SAME_SCORE = 0.5
"""Part of a box's score from which another view has found it again."""
_MOST_BOXES = 300


class View(NamedTuple):
    """How an image is shown: mirrored left to right, then moved right and down by ``shift`` pixels."""

    mirrored: bool
    shift: int

    def shown(self, images: Tensor, sizes_hw: Sequence[tuple[int, int]]) -> Tensor:
        """The images of a padded batch [B, 3, H, W], each changed within its own size; edges are repeated."""
        shown = images.clone()
        for image, (height, width) in zip(shown, sizes_hw, strict=True):
            own = image[:, :height, :width]
            own = own.flip(-1) if self.mirrored else own
            if self.shift:
                own = functional.pad(own[None], (self.shift, 0, self.shift, 0), mode="replicate")[0]
            image[:, :height, :width] = own[:, :height, :width]
        return shown

    def undone(self, boxes: Tensor, sizes_hw: Sequence[tuple[int, int]]) -> Tensor:
        """Boxes [B, Q, 4] of such images (centre and sides as parts of the image's), where the images' own lie."""
        sides = torch.tensor([[width, height] for height, width in sizes_hw], dtype=boxes.dtype, device=boxes.device)
        centres = boxes[..., :2] - self.shift / sides[:, None]
        if self.mirrored:
            centres = torch.stack([1 - centres[..., 0], centres[..., 1]], dim=-1)
        return torch.cat([centres, boxes[..., 2:]], dim=-1)


VIEWS = (View(True, 0), View(False, 4), View(True, 4))
"""Beside the image as it is. Four pixels are half a cell of the finest map of detectors that begin at a stride of 8."""


@dataclass(frozen=True)
class Consensus:
    """What the views say of M boxes.

    Attributes:
        boxes_xyxy: float32 [M, 4] in pixels of the originals, the mean over the views that show it, by score.
        seen_again: int64 [M], the number of other views whose detector finds it again, 0 to V.
        shift_iou: float32 [M], overlap of the box before with the mean.
    """

    boxes_xyxy: NDArray[np.float32]
    seen_again: NDArray[np.int64]
    shift_iou: NDArray[np.float32]


@torch.inference_mode()
def consensus(
    loaded: LoadedDetector,
    source: ImageSource,
    labels: Labels,
    *,
    views: Sequence[View] = VIEWS,
    device: str = "cpu",
    throughput: Throughput = OF_THE_MACHINE,
) -> Consensus:
    """Look again at every image that has boxes, once per view.

    Of every view the box counts that is of the same class and overlaps most, times its score.

    Args:
        loaded: The detector that found the boxes.
        source: The images; it may hold more than the labels.
        labels: M detections with scores in pixels of the upright originals, of classes that the detector knows by
            name.
        views: How the images are shown again.
        device: Torch device.
        throughput: Batch size, decoding processes and precision; by default what suits the machine.

    Raises:
        LabelError: A labelled image is not in the source, or a class is none of the detector's.
    """
    classes = labels.with_categories(loaded.categories).classes
    before = labels.boxes_xyxy.astype(np.float64)
    weights = np.maximum(labels.scores.astype(np.float64), 1e-6)
    sums, seen = before * weights[:, None], np.zeros(len(before), np.int64)
    totals = weights.copy()
    boxed = [image_id for row, image_id in enumerate(labels.image_ids) if labels.offsets[row + 1] > labels.offsets[row]]
    place = {image_id: row for row, image_id in enumerate(labels.image_ids)}
    settings = InferenceSettings.of(loaded.image_settings, **throughput.on(device, len(boxed)))
    detector, own = loaded.detector.to(device).eval(), source.subset(boxed)
    with image_progress("looking again", len(boxed)) as progress:
        for batch in settings.prepared(own) if boxed else ():
            if batch is None:
                continue
            progress(len(batch.targets))
            sizes, originals = (
                [(int(target[name][0]), int(target[name][1])) for target in batch.targets]
                for name in ("size", "orig_size")
            )
            for view in views:
                with settings.autocast():
                    outputs = detector(view.shown(batch.images, sizes).to(device), batch.mask.to(device))
                outputs = {**outputs, "pred_boxes": view.undone(outputs["pred_boxes"].float(), sizes)}
                for target, found in zip(batch.targets, postprocess(outputs, originals, _MOST_BOXES), strict=True):
                    image = place[own.ids[int(target["image_index"])]]
                    rows = np.arange(labels.offsets[image], labels.offsets[image + 1])
                    boxes, scores = _same(labels.boxes_xyxy[rows], classes[rows], found)
                    sums[rows] += boxes * scores[:, None]
                    totals[rows] += scores
                    seen[rows] += scores > SAME_SCORE * labels.scores[rows]
    after = (sums / totals[:, None]).astype(np.float32)
    shift = paired_iou(torch.from_numpy(labels.boxes_xyxy), torch.from_numpy(after)).nan_to_num(1.0)
    return Consensus(after, seen, shift.numpy())


def _same(
    boxes_xyxy: NDArray[np.float32], classes: NDArray[np.int64], found: Detections
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a view found of boxes [n, 4]: its box [n, 4] and score [n] of each; 0 where it found none."""
    boxes, scores, labels = (found[name].double().cpu() for name in ("boxes_xyxy", "scores", "labels"))
    overlaps = pairwise_iou(torch.from_numpy(boxes_xyxy).double(), boxes)
    same = (overlaps > SAME_IOU) & (torch.from_numpy(classes)[:, None] == labels)
    if not same.shape[1]:
        return np.zeros((len(boxes_xyxy), 4)), np.zeros(len(boxes_xyxy))
    worth, best = torch.where(same, overlaps * scores, 0.0).max(dim=1)
    return boxes[best].numpy(), torch.where(worth > 0, scores[best], 0.0).numpy()
